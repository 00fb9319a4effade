"""The benchmark of attention: cases, implementations, errors first, then times and memory, and what they come to.

Axes in names: B batch, T queries, S keys (as many), H heads, D head width.
"""
