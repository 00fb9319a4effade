"""The banner at the start of a run, and ``summary.json``, its result at the end."""

from __future__ import annotations

from typing import Any

from dcscale.cli import short
from dcscale.data import MixedStream, Stream
from dcscale.data.storage import redact
from dcscale.files import write_json
from dcscale.hardware import device_name
from dcscale.models import count_parameters
from dcscale.observe import Console, printable
from dcscale.parallel.deepspeed_config import micro_batches
from dcscale.train.trainer import StopReason, Trainer


def print_banner(console: Console, trainer: Trainer, stream: Stream) -> None:
    """Prints model, attention implementations, ranks, batch, data and folder of the run that is about to start."""
    config, environment = trainer.config, trainer.environment
    parameters = count_parameters(config.model)
    model = "DCFormer" if config.model.attention == "dcmha" else "Transformer"
    console.line(f"model      {model}, {parameters.total:,} parameters ({parameters.compose:,} in compose)")
    for name, reason in trainer.engine.module.implementations(environment.device):
        console.line(f"attention  {name}: {reason}")
    console.line(
        f"ranks      {environment.world_size} x {device_name(environment.device)}, "
        f"ZeRO-{config.parallel.zero_stage}, {config.train.precision}"
    )
    # How much of packed rows is padding is not known before they are read.
    at_most = "at most " if stream.has_packed_rows else ""
    console.line(
        f"batch      {config.train.global_batch_size} sequences of {at_most}{config.data.sequence_length} tokens = "
        f"{at_most}{trainer.inputs_per_step:,} tokens per step; {micro_batches(config, environment.world_size)}"
    )
    epochs = stream.epochs(config.train.steps * config.train.global_batch_size + trainer.state.passed_over_sequences)
    tokens = f"{config.train.steps} steps, {at_most}{config.train.steps * trainer.inputs_per_step:,} tokens"
    if isinstance(stream, MixedStream):
        console.line(f"run        {tokens}")
        for source, share in zip(config.data.sources, stream.shares):
            console.line(
                f"mixture    {share:.2%} {source.name}, {short(epochs[source.name])} epochs of {redact(source.path)}"
            )
    else:
        console.line(f"run        {tokens}, {short(epochs[''])} epochs of {redact(config.data.train)}")
    console.line(f"folder     {trainer.run}")
    if trainer.latest_checkpoint is not None:
        console.line(
            f"resuming   from {trainer.latest_checkpoint}, at sequence {trainer.state.sequences:,} of data "
            f"{stream.fingerprint}"
        )


def summarize(trainer: Trainer, stop_reason: StopReason) -> dict[str, Any]:
    """The content of ``summary.json``.

    ``completed``: whether ``train.steps`` was reached. ``tokens``: tokens trained on, over all ranks, without
    ``padding_tokens``. Losses are in nats/token, ``bits_per_byte`` in bits per byte of validation text.
    ``tokens_per_second`` is over the training steps of all starts of the run.
    """
    state = trainer.state
    hook_results = {key: value for hook in trainer.hooks for key, value in hook.summary(trainer).items()}
    return {
        "completed": stop_reason is StopReason.COMPLETED,
        "steps": state.step,
        "tokens": state.tokens,
        "padding_tokens": state.padding_tokens,
        "steps_without_targets": state.steps_without_targets,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
        "validation_loss": None,
        "bits_per_byte": None,
        "tokens_per_second": state.tokens / state.train_seconds if state.train_seconds else None,
        "train_seconds": state.train_seconds,
        "parameters": count_parameters(trainer.config.model).total,
        "world_size": trainer.environment.world_size,
        "device": str(trainer.environment.device.type),
        "last_checkpoint": str(trainer.latest_checkpoint) if trainer.latest_checkpoint else None,
        "sample": None,
        **hook_results,
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary as lines for the terminal."""
    lines = [
        f"trained    {summary['steps']:,} steps on {summary['tokens']:,} tokens in {summary['train_seconds']:.0f} s"
    ]
    if padding := summary.get("padding_tokens"):  # absent from the summaries of older runs
        lines.append(f"padding    {padding:,} tokens, {padding / (padding + summary['tokens']):.1%} of the inputs")
    if summary.get("steps_without_targets"):
        lines.append(f"no targets in {summary['steps_without_targets']:,} steps, which changed no weight")
    if summary["first_loss"] is not None:
        lines.append(
            f"loss       {summary['first_loss']:.4f} first, {summary['last_loss']:.4f} last (nats/token), "
            f"{summary['tokens_per_second']:,.0f} tokens/s"
        )
    if summary.get("spikes") or summary.get("skipped_updates"):
        lines.append(f"spikes     {summary['spikes']:,}; updates skipped {summary['skipped_updates']:,}")
    if summary.get("rollbacks"):
        lines.append(
            f"rollbacks  {summary['rollbacks']:,}, which passed over {summary['passed_over_sequences']:,} sequences"
        )
    if summary["skipped_shards"]:
        lines.append(f"skipped    {summary['skipped_shards']} shards with {summary['skipped_tokens']:,} tokens")
    if summary["validation_loss"] is not None:
        bits = "" if summary["bits_per_byte"] is None else f", {summary['bits_per_byte']:.4f} bits/byte"
        lines.append(f"validation {summary['validation_loss']:.4f} nats/token{bits}")
    lines.append(f"checkpoint {summary['last_checkpoint']}")
    if summary["sample"] is not None:
        lines += ["sample", *(f"  | {line}" for line in printable(summary["sample"]).splitlines())]
    return lines


def write_summary(trainer: Trainer, stop_reason: StopReason) -> dict[str, Any]:
    """Writes ``summary.json`` into the run folder (rank 0) and returns its content."""
    content = summarize(trainer, stop_reason)
    if trainer.environment.is_main:
        write_json(trainer.run / "summary.json", content)
    return content
