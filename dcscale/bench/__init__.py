"""The benchmarks of tools/bench_*.py, and the meters of time and memory that they share."""
