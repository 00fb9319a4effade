"""Checks of one machine, and of what a run would find on it. Torch is imported by those checks only that need it."""

from dcscale.doctor.local.checks import CHECKS, Check, checks_table, run_checks
from dcscale.doctor.local.subject import Subject, spread, visible_gpus

__all__ = ["CHECKS", "Check", "Subject", "checks_table", "run_checks", "spread", "visible_gpus"]
