"""Formats of checkpoints that are converted from or to, a module or two each."""
