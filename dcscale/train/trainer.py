"""The training loop: fetch a batch, accumulate gradients, update, report. Everything else is a hook."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from dcscale.checkpoint import Checkpointer, CheckpointError
from dcscale.checkpoint.layout import CONFIG, PROBE
from dcscale.checkpoint.probe import Probe, probe_tokens, take_probe
from dcscale.config import Config, to_yaml
from dcscale.data import Batch, BatchLoader, DataError, SkippedShard
from dcscale.observe.metrics import Record
from dcscale.observe.reporter import Reporter
from dcscale.parallel import Engine, NonFiniteError
from dcscale.provenance import git_revision
from dcscale.train.data import StepBatches, next_step_batches, without_secrets
from dcscale.train.hooks.base import Hook, due
from dcscale.train.optimizer import learning_rate
from dcscale.train.signals import StopSignals
from dcscale.train.state import TrainState


class StopReason(Enum):
    """Why :meth:`Trainer.fit` returned. The values are shown to the user."""

    COMPLETED = "all training steps are done"
    STOP_AFTER = "train.stop_after was reached"
    SIGNAL = "a stop signal was received"


@dataclass
class Timings:
    """Sums over some steps."""

    seconds: float = 0.0
    """Wall-clock seconds."""

    wait_seconds: float = 0.0
    """Seconds of these that rank 0 waited for data."""

    steps: int = 0

    tokens: int = 0
    """Tokens trained on, over all ranks."""

    def add(self, seconds: float, wait_seconds: float, tokens: int) -> None:
        """Adds a step."""
        self.seconds += seconds
        self.wait_seconds += wait_seconds
        self.steps += 1
        self.tokens += tokens


class Trainer:
    """Trains from step ``state.step`` to step ``config.train.steps``.

    Args:
        config: the settings of the run.
        engine: model and optimizer under DeepSpeed.
        loader: this rank's training batches.
        state: progress of the run; when resuming, as restored from ``checkpoint``.
        reporter: writes metrics and text.
        hooks: features that run next to the loop, called in this order.
        run: the run folder.
        tokenizer_files: content of the data's tokenizer files, by file name; every checkpoint contains a copy.
        checkpoint: the checkpoint that the run resumes from, if any.
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
        self.inputs_per_step = config.train.global_batch_size * config.data.sequence_length
        """Inputs of the global batch, padding included."""
        self.latest_batch: Batch | None = None
        self.checkpointer = Checkpointer(engine, run, config.checkpoint, checkpoint, state.branched_from)
        self._reporter, self._tokenizer_files = reporter, tokenizer_files
        self._git_revision = git_revision() if self.environment.is_main else None
        # (loss sum of this rank, target count of all ranks) of each step with targets since the last reduction.
        self._local_losses: list[tuple[torch.Tensor, int]] = []
        self._timings = Timings()

    def fit(self) -> StopReason:
        """Trains until the run is complete or is asked to stop. On return the last finished step, if any, is saved.

        Raises:
            DataError: training or validation data failed on a rank; raised on all ranks, after a checkpoint of the
                steps that were done.
            NonFiniteError: the gradient has infinities or NaN; the weights were not updated.
            CheckpointError: a rank could not write its part of a checkpoint; raised on all ranks.
        """
        with StopSignals() as signals, signals.call_on_stop(self.loader.interrupt):
            try:
                return self._train(signals)
            except DataError as error:
                raise DataError(f"{error}{self._save_after_failure()}") from error

    def _train(self, signals: StopSignals) -> StopReason:
        train = self.config.train
        batches = self.loader.steps(self.state.sequences)
        stop_reason = StopReason.COMPLETED
        while self.state.step < train.steps:
            if train.stop_after is not None and self.state.step >= train.stop_after:
                stop_reason = StopReason.STOP_AFTER
                break
            start = time.perf_counter()
            inputs = self._next_batches(batches, signals)
            if inputs.stop:
                stop_reason = StopReason.SIGNAL
                break
            tokens_before = self.state.tokens
            lr, grad_norm = self._step(inputs)
            if inputs.skipped:
                # The skipped shards take effect from the next step on: restart the loader without them.
                batches = self.loader.steps(self.state.sequences)
            seconds = time.perf_counter() - start
            self._timings.add(seconds, inputs.wait_seconds, self.state.tokens - tokens_before)
            self.state.train_seconds += seconds
            if due(self.state.step, self.config.log.interval) or self.state.step == train.steps:
                self._record(lr, grad_norm)
            for hook in self.hooks:
                hook.after_step(self)
        for hook in self.hooks:
            hook.finish(self, stop_reason is StopReason.COMPLETED)
        return stop_reason

    def _next_batches(self, batches: Iterator[list[Batch]], signals: StopSignals) -> StepBatches:
        try:
            step = next_step_batches(self.engine, batches, stop=lambda: signals.received is not None)
            if step is not None and step.skipped:
                self._skip_shards(step.skipped)
        except DataError as error:
            raise DataError(f"the data of step {self.state.step + 1} could not be read: {error}") from error
        assert step is not None, "the training data is endless"
        return step

    def _skip_shards(self, shards: Sequence[SkippedShard]) -> None:
        """Excludes the shards on all ranks, also where they are readable, and in all resumed runs."""
        self.loader.skip([shard.sha256 for shard in shards])
        self.state.skipped += [dataclasses.asdict(shard) for shard in shards]
        for shard in shards:
            self._reporter.warn(f"step {self.state.step + 1} skips a shard of {shard.tokens:,} tokens: {shard.reason}")
        lines = (f"- {shard['name']}: {shard['tokens']:,} tokens. {shard['reason']}" for shard in self.state.skipped)
        self.report_text("data/skipped", "\n".join(lines))

    def _step(self, inputs: StepBatches) -> tuple[float, float | None]:
        """One optimizer step; returns its learning rate and gradient norm, which is None if there was no target."""
        lr = learning_rate(
            self.config.schedule, self.config.optimizer.learning_rate, self.config.train.steps, self.state.step
        )
        grad_norm = None
        if inputs.targets:
            grad_norm = self._update(inputs.micro_batches, inputs.targets, lr)
            self.state.tokens += self.inputs_per_step - inputs.padding
        else:
            # No update: with a gradient of zero, AdamW would still decay the weights and move them by its momentum.
            self.latest_batch = inputs.micro_batches[-1].to(self.environment.device)
            self.state.steps_without_targets += 1
            if self.state.steps_without_targets == 1:
                self._reporter.warn(
                    f"step {self.state.step + 1} has no target to predict, so it has no loss and changes no weight; "
                    "such steps are counted as steps_without_targets"
                )
        self.state.step += 1
        self.state.validation_loss = None
        self.state.sequences += self.config.train.global_batch_size
        self.state.padding_tokens += inputs.padding
        return lr, grad_norm

    def _update(self, micro_batches: list[Batch], targets: int, lr: float) -> float:
        """Forward, backward and the optimizer's update; returns the gradient norm."""
        # Sum the loss over all targets and divide once by their global count, so that the result does not depend on how
        # the batch is split. The engine averages gradients over ranks; world_size undoes that.
        scale = self.environment.world_size / targets
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.environment.device)
        for number, batch in enumerate(micro_batches, start=1):
            batch = batch.to(self.environment.device)
            inputs = (batch.input_ids, batch.targets, batch.document_ids)
            loss_sum += self.engine.forward_backward(inputs, scale, last=number == len(micro_batches))
        self.latest_batch = batch
        self._local_losses.append((loss_sum, targets))
        try:
            return self.engine.update(lr)
        except NonFiniteError as error:
            save_failure = self._finish_save()
            self._reduce_losses()
            loss = self.state.pending[-1][0] / targets
            raise NonFiniteError(
                f"step {self.state.step + 1}: {error}, loss {loss}; the weights were not updated. Newest checkpoint: "
                f"{self.latest_checkpoint}{save_failure}. Lower optimizer.learning_rate, lengthen "
                "schedule.warmup_steps, or inspect the data of this step"
            ) from error

    def _reduce_losses(self) -> None:
        """Sums the losses of the steps since the last call over all ranks, and moves them into ``state.pending``."""
        # Losses stay on the device until a record or checkpoint needs them, so that steps do not wait for the device.
        if self._local_losses:
            sums = self.engine.sum_tensor_over_ranks(torch.stack([loss for loss, _ in self._local_losses]))
            self.state.pending += zip(sums.tolist(), [targets for _, targets in self._local_losses])
            self._local_losses.clear()

    def _record(self, lr: float, grad_norm: float | None) -> None:
        self._reduce_losses()
        state, loss = self.state, None
        if state.pending:
            loss = sum(s for s, _ in state.pending) / sum(n for _, n in state.pending)
            if state.first_loss is None:
                first_sum, first_targets = state.pending[0]
                state.first_loss = first_sum / first_targets
            state.last_loss, state.pending = loss, []
        record: Record = {"step": state.step, "tokens": state.tokens}
        if state.padding_tokens:
            record["padding_tokens"] = state.padding_tokens
        if state.steps_without_targets:
            record["steps_without_targets"] = state.steps_without_targets
        record.update({"loss": loss, "grad_norm": grad_norm, "lr": lr})
        for hook in self.hooks:
            hook.add_to_record(self, record)
        self.report(record)

    # -- after a failure ------------------------------------------------------------------------------------------

    def _finish_save(self) -> str:
        """Waits for a checkpoint that is being written; returns text to append to the error, empty on success."""
        try:
            self.checkpointer.wait()
        except CheckpointError as failure:
            return f"; and {failure}"
        return ""

    def _save_after_failure(self) -> str:
        """Saves the steps that were done, when all ranks fail together; returns text as :meth:`_finish_save`."""
        save_failure = self._finish_save()
        if self.state.step == 0:
            return save_failure
        try:
            self.save()
        except CheckpointError as failure:
            return f"{save_failure}; and {failure}"
        return save_failure + self._finish_save()

    def close(self) -> None:
        """Stops prefetching and closes the reporter's files."""
        self.loader.close()
        self.checkpointer.close()
        self._reporter.close()

    # -- for hooks ------------------------------------------------------------------------------------------------

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return self.checkpointer.latest

    def pop_timings(self) -> Timings:
        """The timings of the steps since the last call."""
        timings, self._timings = self._timings, Timings()
        return timings

    def report(self, record: Record) -> None:
        """Writes a record to the metrics file, TensorBoard and the terminal."""
        self._reporter.record(record)

    def warn(self, text: str) -> None:
        """Prints a warning to the terminal."""
        self._reporter.warn(text)

    def report_text(self, tag: str, markdown: str) -> None:
        """Shows text in TensorBoard."""
        self._reporter.text(tag, markdown, self.state.step)

    def probe(self, tokens: tuple[torch.Tensor, torch.Tensor]) -> Probe:
        """The logits of the current model for a probe batch; all ranks call it together."""
        with self.engine.evaluating() as forward:
            return take_probe(forward, tokens, self.engine.dtype, self.environment.device)

    def save(self) -> None:
        """Starts to write a checkpoint of the last finished step; :attr:`checkpointer` tracks its progress.

        Raises:
            CheckpointError: on every rank, if this checkpoint or an earlier one could not be written.
        """
        self._reduce_losses()
        self.state.hooks = {hook.name: hook.state_dict() for hook in self.hooks}
        state = self.state.to_json(
            world_size=self.environment.world_size,
            zero_stage=self.config.parallel.zero_stage,
            precision=self.config.train.precision,
            global_batch_size=self.config.train.global_batch_size,
            tokenizer=dataclasses.asdict(self.loader.tokenizer),
            git=self._git_revision,
        )
        files = {
            CONFIG: to_yaml(without_secrets(self.config)).encode(),
            PROBE: self.probe(probe_tokens(self.config.model.vocab_size)).to_bytes(),
            **self._tokenizer_files,
        }
        self.checkpointer.save(self.state.step, state, files)
