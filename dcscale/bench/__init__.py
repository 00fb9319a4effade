"""What tools/bench_*.py measure, and what they share: times, memory, and the facts that a figure has to carry."""
