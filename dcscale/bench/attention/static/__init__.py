"""What the compose kernels of a call cost by their code, without a GPU: a model, nothing measured.

plan.py finds the launches of a call (and times them on a GPU), compilation.py compiles their kernels ahead of time,
sass.py reads the machine code, paths.py counts the instructions that a warp issues, cost.py turns counts and bytes into
time by named assumptions, report.py makes tables, tool.py is the command line.
"""
