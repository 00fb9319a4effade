"""The training loop: fetch a batch, accumulate gradients, update, report. Everything else is a hook."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from dcscale.checkpoint import Checkpointer, CheckpointError
from dcscale.checkpoint.layout import CONFIG, PROBE
from dcscale.checkpoint.probe import Probe, probe_tokens, take_probe
from dcscale.cluster.ending import Ending
from dcscale.cluster.watchdog import Unwatched, Watchdog
from dcscale.config import Config, to_yaml
from dcscale.data import Batch, BatchLoader, DataError, SkippedShard
from dcscale.lease import Lease
from dcscale.observe.events import EventFile
from dcscale.observe.metrics import Record
from dcscale.observe.reporter import Reporter
from dcscale.observe.requests import RequestFiles
from dcscale.parallel import Engine, run_on_all_ranks
from dcscale.provenance import git_revision
from dcscale.signals import StopSignals
from dcscale.train.data import Requests, StepBatches, next_step_batches, without_secrets
from dcscale.train.hooks.base import Hook, due
from dcscale.train.numerics import KEPT_SKIPS, Action, DivergedError, Judgement, is_norm, judge, list_some
from dcscale.train.optimizer import learning_rate
from dcscale.train.restore.start import Start
from dcscale.train.rollback import roll_back
from dcscale.train.state import TrainState


class StopReason(Enum):
    """Why :meth:`Trainer.fit` returned. The values are shown to the user."""

    COMPLETED = "all training steps are done"
    STOP_AFTER = "train.stop_after was reached"
    SIGNAL = "a stop signal was received"
    TIME_LIMIT = "train.stop_after_minutes have passed"


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
        events: where this rank writes what happens.
        hooks: features that run next to the loop, called in this order.
        run: the run folder.
        tokenizer_files: content of the data's tokenizer files, by file name; every checkpoint contains a copy.
        checkpoint: the checkpoint that the run resumes from, if any.
        lease: what rank 0 holds the run folder by; None: nobody else uses it.
        watchdog: notified of what this rank does; None: nobody ends a run that hangs.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: BatchLoader,
        state: TrainState,
        reporter: Reporter,
        events: EventFile,
        hooks: Sequence[Hook],
        run: Path,
        tokenizer_files: Mapping[str, bytes],
        checkpoint: Path | None = None,
        lease: Lease | None = None,
        watchdog: Watchdog | None = None,
    ):
        self.watchdog = watchdog or Unwatched()
        self.config, self.engine, self.loader, self.state = config, engine, loader, state
        self.environment = engine.environment
        self.events, self.hooks, self.run = events, hooks, run
        self.step_seconds = 0.0
        """Wall-clock seconds of the last step."""
        self.inputs_per_step = config.train.global_batch_size * config.data.sequence_length
        """Inputs of the global batch, padding included."""
        self.latest_batch: Batch | None = None
        self.save_requested = False
        """Whether a checkpoint is due after this step by the clock of rank 0."""
        self.look_requested = False
        """Whether rank 0 found a request file while the batches of this step were read."""
        self.request_files = RequestFiles(run)
        self.seconds_now = time.monotonic
        """The clock for time limits."""
        self._last_save = self.seconds_now()
        self.checkpointer = Checkpointer(engine, run, config.checkpoint, checkpoint, state.branched_from, lease)
        self.lease, self._reporter, self._tokenizer_files = lease, reporter, tokenizer_files
        self._git_revision = git_revision() if self.environment.is_main else None
        self._timings = Timings()
        self._first_hook_states: dict[str, dict] = {}
        """State of the hooks when this start began, by name."""

    def fit(self, signals: StopSignals | None = None) -> StopReason:
        """Trains until the run is complete or is asked to stop. On return the last finished step, if any, is saved.

        Args:
            signals: the stop signals of this process, if they are handled already.

        Raises:
            DataError: training or validation data failed on a rank; raised on all ranks, after a checkpoint of the
                steps that were done.
            DivergedError: losses or gradients are not finite, or spike, and the config says to stop; raised on all
                ranks, after a checkpoint of the steps before.
            CheckpointError: a rank could not write its part of a checkpoint; raised on all ranks.
        """
        handled = Ending().signals if signals is None else contextlib.nullcontext(signals)
        with handled as signals, signals.deferred(self.loader.interrupt):
            try:
                return self._train(signals)
            except DataError as error:
                raise DataError(f"{error}{self._save_after_failure()}") from error
            except DivergedError as error:
                failure = self._save_after_failure()
                newest = self.latest_checkpoint or "none"
                raise DivergedError(f"{error}. Newest checkpoint: {newest}{failure}", error.rank) from error

    def _train(self, signals: StopSignals) -> StopReason:
        train = self.config.train
        self._first_hook_states = {hook.name: hook.state_dict() for hook in self.hooks}
        batches = self.loader.steps(self.state.sequences)
        stop_reason = StopReason.COMPLETED
        while self.state.step < train.steps:
            if train.stop_after is not None and self.state.step >= train.stop_after:
                stop_reason = StopReason.STOP_AFTER
                break
            if self.lease is not None:
                self.lease.raise_if_lost()
            for hook in self.hooks:
                hook.before_step(self)
            start = time.perf_counter()
            with self.watchdog.phase("data"), self.engine.clock.phase("data"):
                inputs = self._next_batches(batches, signals)
            if inputs.requests.stop or inputs.requests.time_is_up:
                stop_reason = StopReason.SIGNAL if inputs.requests.stop else StopReason.TIME_LIMIT
                break
            self.save_requested, self.look_requested = inputs.requests.save, inputs.requests.look
            tokens_before = self.state.tokens
            with self.watchdog.phase("step"):
                lr, judgement = self._step(inputs)
            if judgement is not None and judgement.reason is not None and self._went_back(judgement):
                batches = self.loader.steps(self.state.sequences)
                continue
            self._advance(inputs, judgement)
            if inputs.skipped:
                # The skipped shards take effect from the next step on: restart the loader without them.
                batches = self.loader.steps(self.state.sequences)
            seconds = self.step_seconds = time.perf_counter() - start
            self.watchdog.step_done(self.state.step, seconds)
            self._timings.add(seconds, inputs.wait_seconds, self.state.tokens - tokens_before)
            self.state.train_seconds += seconds
            if due(self.state.step, self.config.log.interval) or self.state.step == train.steps:
                self._record(lr, judgement)
            for hook in self.hooks:
                with self.watchdog.phase(hook.name):
                    hook.after_step(self)
            if self.state.numerics.skipped_in_a_row >= train.max_skipped_updates:
                raise DivergedError(
                    f"the updates of {self.state.numerics.skipped_in_a_row} steps in a row, up to step "
                    f"{self.state.step}, were skipped, and train.max_skipped_updates is {train.max_skipped_updates}: "
                    "lower optimizer.learning_rate, or inspect the data of these steps"
                )
        for hook in self.hooks:
            with self.watchdog.phase(hook.name):
                hook.finish(self, stop_reason is StopReason.COMPLETED)
        return stop_reason

    def _next_batches(self, batches: Iterator[list[Batch]], signals: StopSignals) -> StepBatches:
        try:
            step = next_step_batches(self.engine, batches, lambda: self._requests(signals))
            if step is not None and step.skipped:
                self._skip_shards(step.skipped)
        except DataError as error:
            raise DataError(f"the data of step {self.state.step + 1} could not be read: {error}") from error
        assert step is not None, "the training data is endless"
        return step

    def _requests(self, signals: StopSignals) -> Requests:
        """What this rank asks for. Only rank 0 looks at its clock, and for request files."""
        limit, interval = self.config.train.stop_after_minutes, self.config.checkpoint.interval_minutes
        now = self.seconds_now()
        return Requests(
            stop=signals.received is not None,
            time_is_up=self.environment.is_main and limit is not None and now - signals.started >= 60 * limit,
            save=self.environment.is_main and interval is not None and now - self._last_save >= 60 * interval,
            look=self.environment.is_main and self.request_files.found(),
        )

    def _skip_shards(self, shards: Sequence[SkippedShard]) -> None:
        """Excludes the shards on all ranks, also where they are readable, and in all resumed runs."""
        self.loader.skip([shard.sha256 for shard in shards])
        self.state.skipped += [dataclasses.asdict(shard) for shard in shards]
        for shard in shards:
            self._reporter.warn(f"step {self.state.step + 1} skips a shard of {shard.tokens:,} tokens: {shard.reason}")
        lines = (f"- {shard['name']}: {shard['tokens']:,} tokens. {shard['reason']}" for shard in self.state.skipped)
        self.report_text("data/skipped", "\n".join(lines))

    def _step(self, inputs: StepBatches) -> tuple[float, Judgement | None]:
        """Forward, backward and, if the judgement is so, the optimizer's update.

        Returns:
            The learning rate, and the judgement on the step; None if there was no target.
        """
        lr = learning_rate(
            self.config.schedule, self.config.optimizer.learning_rate, self.config.train.steps, self.state.step
        )
        if not inputs.targets:
            # No update: with a gradient of zero, AdamW would still decay the weights and move them by its momentum.
            self.latest_batch = inputs.micro_batches[-1].to(self.environment.device)
            return lr, None
        # Sum the loss over all targets and divide once by their global count, so that the result does not depend on how
        # the batch is split. The engine averages gradients over ranks; world_size undoes that.
        scale = self.environment.world_size / inputs.targets
        losses = []
        for number, batch in enumerate(inputs.micro_batches, start=1):
            batch = batch.to(self.environment.device)
            arguments = (batch.input_ids, batch.targets, batch.document_ids)
            losses.append(self.engine.forward_backward(arguments, scale, last=number == len(inputs.micro_batches)))
        self.latest_batch = batch
        judgements: list[Judgement] = []

        def accept(loss_sum: float, grad_norm: float) -> bool:
            recent = self.state.numerics.recent
            judgements.append(judge(self.config.train, recent, loss_sum, inputs.targets, grad_norm))
            return judgements[0].action is Action.UPDATE

        self.engine.update(lr, torch.stack(losses).double().sum(), accept)
        (judgement,) = judgements
        if not judgement.finite:
            where, rank = self._not_finite(losses)
            judgement = dataclasses.replace(judgement, reason=f"{judgement.reason}; {where}", rank=rank)
        return lr, judgement

    def _not_finite(self, losses: list[torch.Tensor]) -> tuple[str, int]:
        """Which sequences have no finite loss, given this rank's loss of each micro-batch; and of which rank they are.

        The rank is -1 if they are of several or none.
        """
        finite = torch.stack(losses).isfinite().tolist()
        numbers = self.loader.numbers(self.state.sequences)
        own = [number for part, good in zip(numbers, finite, strict=True) if not good for number in part]
        answers = enumerate(self.engine.gather_objects((socket.gethostname(), own)))
        found = {rank: f"rank {rank} ({host}): sequences {list_some(part)}" for rank, (host, part) in answers if part}
        if not found:
            return "the loss is finite on every rank", -1
        rank = next(iter(found)) if len(found) == 1 else -1
        return f"the loss is not finite on {list_some([*found.values()], '; ')}", rank

    def _went_back(self, judgement: Judgement) -> bool:
        """Reports a step that is not as it should be; returns whether the run went back to a checkpoint because of it.

        Raises:
            DivergedError: the config says to stop.
        """
        train, numerics, step = self.config.train, self.state.numerics, self.state.step + 1
        if judgement.spike and train.on_spike == "ignore":
            return False
        sequences = [self.state.sequences, self.state.sequences + train.global_batch_size]
        if self.environment.is_main:
            self.events.write(
                "spike" if judgement.spike else "nonfinite",
                step=step,
                reason=judgement.reason,
                sequences=sequences,
                loss=judgement.loss,
                grad_norm=judgement.grad_norm,
                action=judgement.action.name.lower(),
            )
        text = f"step {step}, sequences {sequences[0]:,} to {sequences[1] - 1:,}: {judgement.reason}"
        if judgement.action is Action.STOP:
            raise DivergedError(
                f"{text}. The weights were not updated. Lower optimizer.learning_rate, lengthen schedule.warmup_steps, "
                "inspect the data of this step, or skip such updates (train.on_nonfinite=skip)",
                judgement.rank,
            )
        if judgement.action is Action.ROLL_BACK:
            with self.watchdog.phase("rollback"):
                if roll_back(self, text, str(judgement.reason)):
                    return True
        elif judgement.action is Action.SKIP:
            policy = f"train.on_spike={train.on_spike}" if judgement.spike else "train.on_nonfinite=skip"
            self.warn(
                f"{text}. The update is skipped ({policy}), {numerics.skipped_in_a_row + 1} of at most "
                f"{train.max_skipped_updates} in a row"
            )
        else:
            self.warn(f"{text} (train.on_spike=warn)")
        if judgement.action is not Action.UPDATE:
            skip = {"step": step, "reason": judgement.reason, "sequences": sequences}
            numerics.skips = [*numerics.skips[1 - KEPT_SKIPS :], skip]
        return False

    def _advance(self, inputs: StepBatches, judgement: Judgement | None) -> None:
        """Counts a step, with or without an update."""
        state, train = self.state, self.config.train
        state.step += 1
        state.validation_loss = None
        state.sequences += train.global_batch_size
        state.padding_tokens += inputs.padding
        if judgement is None:
            state.steps_without_targets += 1
            if state.steps_without_targets == 1:
                self.warn(
                    f"step {state.step} has no target to predict, so it has no loss and changes no weight; "
                    "such steps are counted as steps_without_targets"
                )
            return
        if judgement.action is Action.UPDATE:
            state.tokens += self.inputs_per_step - inputs.padding
        if math.isfinite(judgement.loss_sum):
            state.pending.append((judgement.loss_sum, judgement.targets))
        restarted = state.numerics.count(judgement, restart_after=train.max_skipped_updates)
        if restarted and train.on_spike == "warn":
            self.warn(
                f"step {state.step} is the last of {train.max_skipped_updates} spikes in a row: loss and gradient norm "
                "are compared with later steps from here on"
            )

    def _record(self, lr: float, judgement: Judgement | None) -> None:
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
        finite = judgement is not None and is_norm(judgement.grad_norm)
        record.update({"loss": loss, "grad_norm": judgement.grad_norm if finite else None, "lr": lr})
        if judgement is not None and judgement.score is not None:
            record["spike_score"] = judgement.score
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
        """Stops prefetching, closes the files and releases the run folder."""
        self.loader.close()
        self.checkpointer.close()
        self.close_files()
        if self.lease is not None:
            self.lease.release()
        self.watchdog.close()

    def close_files(self) -> None:
        """Makes metrics and events durable; may be called by any thread, and again."""
        self._reporter.close()
        self.events.close()

    # -- for hooks ------------------------------------------------------------------------------------------------

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return self.checkpointer.latest

    def go_back_to(self, start: Start) -> None:
        """Takes the place in training that a new start would take; all ranks call it together."""
        assert start.saved is not None, "it is a checkpoint"
        self.engine.load(start.saved)
        start.state.scratch_mib = self.state.scratch_mib  # which this start computes with
        self.state, self.checkpointer.latest = start.state, start.checkpoint
        for hook in self.hooks:
            # A hook that is not in the checkpoint was not enabled before this start of the run.
            hook.load_state_dict(self.state.hooks.get(hook.name, self._first_hook_states[hook.name]))
        self._timings = Timings()
        self.engine.clock.pop()
        run_on_all_ranks(lambda: self._reporter.drop_after(self.state.step))

    def pop_timings(self) -> Timings:
        """The timings of the steps since the last call."""
        timings, self._timings = self._timings, Timings()
        return timings

    def report(self, record: Record) -> None:
        """Writes a record to the metrics file, TensorBoard and the terminal."""
        self._reporter.record(record)

    def line(self, text: str) -> None:
        """Prints a line to the terminal."""
        self._reporter.line(text)

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
        self._last_save = self.seconds_now()
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
