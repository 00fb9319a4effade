"""The training loop: read a batch, add up gradients, update, report. Everything else is a hook."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

import torch

from dcscale.checkpoint import CheckpointError, Checkpoints
from dcscale.checkpoint.layout import CONFIG, PROBE
from dcscale.checkpoint.probe import Probe, probe_tokens, take_probe
from dcscale.config import Config, to_yaml
from dcscale.data import Batch, BatchLoader, DataError, SkippedShard
from dcscale.observe.metrics import Record
from dcscale.observe.reporter import Reporter
from dcscale.parallel import Engine, NonFiniteError
from dcscale.provenance import git_revision
from dcscale.train.data import StepBatches, next_on_all_ranks, without_secrets
from dcscale.train.hooks.base import Hook, due
from dcscale.train.optimizer import learning_rate
from dcscale.train.signals import StopSignals
from dcscale.train.state import TrainState


class StopReason(Enum):
    """Why :meth:`Trainer.fit` returned."""

    COMPLETED = "all steps of the run are done"
    STOP_AFTER = "train.stop_after was reached"
    SIGNAL = "a signal asked to stop"


class Trainer:
    """Trains from ``state.step`` to ``config.train.steps``.

    Args:
        config: the run's settings.
        engine: the model and its optimizer.
        loader: this rank's batches, for any step.
        state: where the run stands; restored by the caller when it goes on from a checkpoint.
        reporter: where records go.
        hooks: features, called in order.
        run: the run's folder.
        tokenizer_files: what is needed to load the data's tokenizer, by name; every checkpoint holds a copy.
        checkpoint: the one that ``state`` is of, if it is of one.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: BatchLoader,
        state: TrainState,
        reporter: Reporter,
        hooks: Sequence[Hook],
        run: Path,
        tokenizer_files: Mapping[str, bytes],
        checkpoint: Path | None = None,
    ):
        self.config, self.engine, self.loader, self.state = config, engine, loader, state
        self.environment = engine.environment
        self.hooks, self.run = hooks, run
        self.tokens_per_step = config.train.global_batch_size * config.data.sequence_length
        self.latest_batch: Batch | None = None
        self.checkpoints = Checkpoints(engine, run, config.checkpoint, checkpoint, state.branched_from)
        self._reporter, self._tokenizer_files = reporter, tokenizer_files
        self._revision = git_revision() if self.environment.is_main else None
        self._unsummed: list[tuple[torch.Tensor, int]] = []
        self._seconds, self._waited, self._timed_steps = 0.0, 0.0, 0

    def fit(self) -> StopReason:
        """Trains until the run is complete or must stop; always leaves a checkpoint of the last step.

        Raises:
            DataError: the data of one rank failed, held-out ones too; raised on all ranks, after a checkpoint of what
                was done.
            NonFiniteError: a gradient is infinite or not a number; its update was not made.
            CheckpointError: a checkpoint could not be written by one rank; raised on all ranks.
        """
        with StopSignals() as signals, signals.calling(self.loader.interrupt):
            try:
                return self._train(signals)
            except DataError as error:
                raise DataError(f"{error}{self._save_before_failing()}") from error

    def _train(self, signals: StopSignals) -> StopReason:
        train = self.config.train
        batches = self.loader.steps(self.state.sequences)
        ending = StopReason.COMPLETED
        while self.state.step < train.steps:
            if train.stop_after is not None and self.state.step >= train.stop_after:
                ending = StopReason.STOP_AFTER
                break
            start = time.perf_counter()
            step = self._next_batches(batches, signals)
            if step.stop:
                ending = StopReason.SIGNAL
                break
            lr, grad_norm = self._step(step.micro_batches, step.targets)
            if step.skipped:
                batches = self.loader.steps(self.state.sequences)
            seconds = time.perf_counter() - start
            self._seconds += seconds
            self._waited += step.waited
            self._timed_steps += 1
            self.state.train_seconds += seconds
            if due(self.state.step, self.config.log.interval) or self.state.step == train.steps:
                self._record(lr, grad_norm)
            for hook in self.hooks:
                hook.after_step(self)
        for hook in self.hooks:
            hook.finish(self, ending is StopReason.COMPLETED)
        return ending

    def _end_saving(self) -> str:
        """Waits for a checkpoint under way, before training fails; returns what to add to its failure, if anything."""
        try:
            self.checkpoints.wait()
        except CheckpointError as failure:
            return f"; and {failure}"
        return ""

    def _save_before_failing(self) -> str:
        """Writes a checkpoint of what was done, where the ranks fail together; returns as :meth:`_end_saving`."""
        also = self._end_saving()
        if self.state.step == 0:
            return also
        try:
            self.save()
        except CheckpointError as failure:
            return f"{also}; and {failure}"
        return also + self._end_saving()

    def _next_batches(self, batches: Iterator[list[Batch]], signals: StopSignals) -> StepBatches:
        try:
            step = next_on_all_ranks(self.engine, batches, stop=lambda: signals.received is not None)
            if step is not None and step.skipped:
                self._give_up(step.skipped)
        except DataError as error:
            raise DataError(f"the data of step {self.state.step + 1} could not be read: {error}") from error
        assert step is not None, "the training data is endless"
        return step

    def _give_up(self, shards: Sequence[SkippedShard]) -> None:
        """From the next step on no rank uses these shards, whether it could or not, nor does a resumed run."""
        self.loader.skip([shard.sha256 for shard in shards])
        self.state.skipped += [dataclasses.asdict(shard) for shard in shards]
        for shard in shards:
            self._reporter.warn(f"step {self.state.step + 1} skips a shard of {shard.tokens:,} tokens: {shard.reason}")
        lines = (f"- {shard['name']}: {shard['tokens']:,} tokens. {shard['reason']}" for shard in self.state.skipped)
        self.report_text("data/skipped", "\n".join(lines))

    def _step(self, micro_batches: list[Batch], targets: int) -> tuple[float, float]:
        """One optimizer step; returns its learning rate and gradient norm."""
        # The loss is summed over all targets and divided once by their global count, so that it does not
        # depend on how the batch is cut; the engine's averaging over ranks is undone here.
        scale = self.environment.world_size / max(targets, 1)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.environment.device)
        for number, batch in enumerate(micro_batches, start=1):
            batch = batch.to(self.environment.device)
            inputs = (batch.input_ids, batch.targets, batch.document_ids)
            loss_sum += self.engine.forward_backward(inputs, scale, last=number == len(micro_batches))
        self.latest_batch = batch
        self._unsummed.append((loss_sum, targets))
        lr = learning_rate(
            self.config.schedule, self.config.optimizer.learning_rate, self.config.train.steps, self.state.step
        )
        try:
            grad_norm = self.engine.update(lr)
        except NonFiniteError as error:
            also = self._end_saving()
            self._sum_losses()
            loss = self.state.pending[-1][0] / max(targets, 1)
            raise NonFiniteError(
                f"step {self.state.step + 1}: {error}, loss {loss}; the update was not made. Newest checkpoint: "
                f"{self.latest_checkpoint}{also}. Lower optimizer.learning_rate, lengthen schedule.warmup_steps, or "
                "look at the data of this step"
            ) from error
        self.state.step += 1
        self.state.validation_loss = None
        self.state.sequences += self.config.train.global_batch_size
        self.state.tokens += self.tokens_per_step
        return lr, grad_norm

    def _sum_losses(self) -> None:
        """Moves the steps' losses from the ranks' devices into the state, summed over ranks."""
        if self._unsummed:
            sums = self.engine.sum_tensor_over_ranks(torch.stack([loss for loss, _ in self._unsummed]))
            self.state.pending += zip(sums.tolist(), [targets for _, targets in self._unsummed])
            self._unsummed.clear()

    def _record(self, lr: float, grad_norm: float) -> None:
        self._sum_losses()
        loss = sum(s for s, _ in self.state.pending) / max(1, sum(n for _, n in self.state.pending))
        if self.state.first_loss is None:
            first_sum, first_targets = self.state.pending[0]
            self.state.first_loss = first_sum / max(1, first_targets)
        self.state.last_loss = loss
        self.state.pending = []
        record: Record = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
        }
        for hook in self.hooks:
            hook.add_to_record(self, record)
        self.report(record)

    def close(self) -> None:
        """Stops reading ahead and closes the reporter's files."""
        self.loader.close()
        self.checkpoints.close()
        self._reporter.close()

    # -- for hooks -----------------------------------------------------------------------------------------------

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return self.checkpoints.latest

    def take_times(self) -> tuple[float, float, int]:
        """Seconds spent in steps, part of them spent waiting for data, and steps, since the last call."""
        times = self._seconds, self._waited, self._timed_steps
        self._seconds, self._waited, self._timed_steps = 0.0, 0.0, 0
        return times

    def report(self, record: Record) -> None:
        """Sends a record to file, board and terminal."""
        self._reporter.record(record)

    def warn(self, text: str) -> None:
        """Tells the person at the terminal of something that should not be."""
        self._reporter.warn(text)

    def report_text(self, tag: str, markdown: str) -> None:
        """Shows text in TensorBoard."""
        self._reporter.text(tag, markdown, self.state.step)

    def probe(self, tokens: tuple[torch.Tensor, torch.Tensor]) -> Probe:
        """What the model makes of these tokens now; all ranks call it together."""
        with self.engine.evaluating() as forward:
            return take_probe(forward, tokens, self.engine.dtype, self.environment.device)

    def save(self) -> None:
        """Begins to write a checkpoint of the last finished step; :attr:`checkpoints` says how it goes.

        Raises:
            CheckpointError: on every rank, if one could not be written: this or an earlier one.
        """
        self._sum_losses()
        self.state.hooks = {hook.name: hook.state_dict() for hook in self.hooks}
        state = self.state.to_json(
            world_size=self.environment.world_size,
            zero_stage=self.config.parallel.zero_stage,
            precision=self.config.train.precision,
            global_batch_size=self.config.train.global_batch_size,
            tokenizer=dataclasses.asdict(self.loader.tokenizer),
            git=self._revision,
        )
        files = {
            CONFIG: to_yaml(without_secrets(self.config)).encode(),
            PROBE: self.probe(probe_tokens(self.config.model.vocab_size)).to_bytes(),
            **self._tokenizer_files,
        }
        self.checkpoints.save(self.state.step, state, files)
