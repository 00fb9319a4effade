"""Everything that keeps a run from starting, found before the model is allocated or a file is written.

``launch/train.py`` and ``tools/check_config.py`` both call :func:`preflight`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from dcscale.checkpoint import CheckpointError
from dcscale.config import Config, DataConfig
from dcscale.data import DataError
from dcscale.doctor.start import NodeCheckError
from dcscale.files import may_succeed_later
from dcscale.models import DCFormer
from dcscale.observe.metrics import lines_until
from dcscale.parallel import Environment, RankError, broadcast_from_rank0, run_on_all_ranks
from dcscale.train.data import RunData, open_data, open_training_stream, open_validation_stream
from dcscale.train.hooks import Hook, build_hooks
from dcscale.train.optimizer import RuleError, parameter_groups
from dcscale.train.restore.start import Start, find_start

T = TypeVar("T")

SERVER_SECONDS = 20.0
"""Longest wait of a quick check for a server that does not answer."""


class PreflightError(RuntimeError):
    """A run cannot start, for several reasons; lists them.

    Args:
        message: the message.
        retry: whether another start may succeed, see :func:`dcscale.files.may_succeed_later`.
    """

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


REFUSALS = (DataError, CheckpointError, RuleError, RankError, PreflightError, NodeCheckError)
"""What is raised if data, checkpoint, optimizer rules, run folder or nodes do not fit the config."""


@dataclass
class Preflight:
    """What a run starts with, as far as it could be found, and the reasons why it cannot start."""

    data: RunData | None = None
    start: Start | None = None
    hooks: list[Hook] | None = None
    problems: list[Exception] = field(default_factory=list)

    def attempt(self, call: Callable[[], T]) -> T | None:
        """The result of ``call``; None if it fails, with the error in ``problems``.

        Errors of any kind are kept, since the other ranks go on to the next collective.
        """
        try:
            return call()
        except Exception as error:
            self.problems.append(error)
            return None

    @property
    def reasons(self) -> list[str]:
        """The problems as texts.

        Raises:
            Exception: the first problem that is no refusal, but a fault of the program.
        """
        for problem in self.problems:
            if not isinstance(problem, REFUSALS):
                raise problem
        return list(dict.fromkeys(map(str, self.problems)))

    def result(self) -> tuple[RunData, Start, list[Hook]]:
        """What the run starts with.

        Raises:
            PreflightError: there are several problems; if there is one, that is raised.
        """
        reasons = self.reasons
        if len(reasons) == 1:
            raise self.problems[0]
        if reasons:
            message = "\n  - ".join([f"the run has {len(reasons)} problems and cannot start:", *reasons])
            raise PreflightError(message, retry=all(map(may_succeed_later, self.problems)))
        return self.data, self.start, self.hooks  # type: ignore[return-value]


def preflight(config: Config, environment: Environment, quick: bool = False) -> Preflight:
    """Opens data and checkpoint, and checks them, the optimizer rules and the run folder; all ranks call it together.

    Changes no files, reads no shards and allocates no model. ``config`` must have passed
    :func:`dcscale.config.check_config`.

    Args:
        config: the settings of the run.
        environment: this process.
        quick: this process alone checks for all ranks, without reading checkpoints to compare their checksums, and
            waits at most ``SERVER_SECONDS`` for a server that does not answer.
    """
    found = Preflight()
    if quick:
        found.attempt(lambda: _check_cache(config.data))
        config = replace(config, data=_impatient(config.data))
    stream = found.attempt(lambda: run_on_all_ranks(lambda: open_training_stream(config)))
    validation = found.attempt(lambda: run_on_all_ranks(lambda: open_validation_stream(config)))
    if stream is not None:
        found.data = found.attempt(
            lambda: run_on_all_ranks(lambda: open_data(config, environment, stream, validation, all_shards=quick))
        )
    found.start = found.attempt(lambda: find_start(config, environment, stream, verify=not quick))
    found.attempt(lambda: run_on_all_ranks(lambda: check_rules(config)))
    step = 0 if found.start is None else found.start.state.step
    found.attempt(lambda: broadcast_from_rank0(lambda: _check_run_folder(Path(config.run.folder), step)))
    data, start = found.data, found.start
    if data is not None and start is not None:
        found.attempt(lambda: data.loader.skip([shard["sha256"] for shard in start.state.skipped]))
        found.hooks = found.attempt(
            lambda: run_on_all_ranks(lambda: build_hooks(config, environment, data, start.state))
        )
    return found


def check_rules(config: Config) -> None:
    """Raises RuleError if a rule of ``optimizer.rules`` matches no parameter of the model."""
    if config.optimizer.rules:
        with torch.device("meta"):
            parameter_groups(DCFormer(config.model), config.optimizer)


def _check_run_folder(run: Path, step: int) -> None:
    """Raises CheckpointError if a run that resumes from ``step`` could not write to the folder."""
    with run_folder_errors(run):
        lines_until(run / "metrics.jsonl", step)
        _check_writable(run / "checkpoints")


def _check_writable(folder: Path) -> None:
    """Raises OSError if a folder, which may be missing, could not be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write to {existing}")


def _check_cache(data: DataConfig) -> None:
    """Raises DataError if the cache could not be written to, which opening the data would find out by creating it."""
    try:
        if data.cache is not None:
            _check_writable(Path(data.cache))
    except OSError as error:
        raise DataError(f"data.cache is {data.cache}, but cannot be used: {error}; name another, or null") from error


def _impatient(data: DataConfig) -> DataConfig:
    """The settings without a cache, and with short time limits."""
    return replace(
        data,
        cache=None,
        timeout_seconds=min(data.timeout_seconds, SERVER_SECONDS / 2),
        retry_total_seconds=min(data.retry_total_seconds, SERVER_SECONDS),
    )


@contextlib.contextmanager
def run_folder_errors(run: Path) -> Iterator[None]:
    """Turns errors of the file system into a CheckpointError that names the setting to change."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: metrics.jsonl has lines that are not records of a run
        raise CheckpointError(f"run.folder {run} cannot be used: {error}; use another folder") from error
