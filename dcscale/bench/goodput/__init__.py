"""Goodput of a run with failures: useful training time / wall-clock time, measured and simulated.

A step is useful if the run still has it at the end. What a run loses is what it trained after its newest complete
checkpoint and must train again, the time in which checkpoints block it, and the time from a failure to the first step
of the next start.
"""

from __future__ import annotations
