"""What is shown of a run at its start, and ``summary.json``: its result in one small file."""

from __future__ import annotations

from typing import Any

from dcscale.data import MixedStream, Stream
from dcscale.data.storage import shown
from dcscale.files import write_json
from dcscale.hardware import device_name
from dcscale.models import count_parameters
from dcscale.observe import Console, printable
from dcscale.parallel.deepspeed_config import accumulation_steps
from dcscale.train.trainer import StopReason, Trainer


def print_banner(console: Console, trainer: Trainer, stream: Stream) -> None:
    """Prints what is about to run, with everything that was derived."""
    config, environment = trainer.config, trainer.environment
    parameters = count_parameters(config.model)
    model = "DCFormer" if config.model.attention == "dcmha" else "Transformer"
    console.line(f"model      {model}, {parameters.total:,} parameters ({parameters.compose:,} of compose)")
    for name, why in trainer.engine.module.implementations(environment.device):
        console.line(f"attention  {name}: {why}")
    console.line(
        f"ranks      {environment.world_size} x {device_name(environment.device)}, "
        f"ZeRO-{config.parallel.zero_stage}, {config.train.precision}"
    )
    console.line(
        f"batch      {config.train.global_batch_size} sequences of {config.data.sequence_length} tokens = "
        f"{trainer.tokens_per_step:,} tokens a step; {config.train.micro_batch_size} a rank at once, "
        f"{accumulation_steps(config, environment.world_size)} times"
    )
    epochs = stream.epochs(config.train.steps * config.train.global_batch_size)
    tokens = f"{config.train.steps} steps, {config.train.steps * trainer.tokens_per_step:,} tokens"
    if isinstance(stream, MixedStream):
        console.line(f"run        {tokens}")
        for source, share in zip(config.data.sources, stream.shares):
            used = f"{epochs[source.name]:.2f} epochs of {shown(source.path)}"
            console.line(f"mixture    {share:.2%} {source.name}, {used}")
    else:
        console.line(f"run        {tokens}, {epochs['']:.2f} epochs of {shown(config.data.train)}")
    console.line(f"folder     {trainer.run}")
    if trainer.latest_checkpoint is not None:
        console.line(
            f"resuming   from {trainer.latest_checkpoint}, with sequence {trainer.state.sequences:,} of data "
            f"{stream.fingerprint}"
        )


def summarize(trainer: Trainer, ending: StopReason) -> dict[str, Any]:
    """The summary's content.

    ``tokens`` counts tokens read in training over all ranks; losses are in nats a token, ``bits_per_byte``
    in bits a byte of held-out text; ``tokens_per_second`` is over the training steps of all starts of the
    run; ``completed`` tells whether ``train.steps`` was reached.
    """
    state = trainer.state
    of_hooks = {key: value for hook in trainer.hooks for key, value in hook.summary(trainer).items()}
    return {
        "completed": ending is StopReason.COMPLETED,
        "steps": state.step,
        "tokens": state.tokens,
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
        **of_hooks,
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary for a person at the terminal."""
    lines = [f"steps      {summary['steps']:,} of {summary['tokens']:,} tokens in {summary['train_seconds']:.0f} s"]
    if summary["first_loss"] is not None:
        lines.append(
            f"loss       {summary['first_loss']:.4f} at first, {summary['last_loss']:.4f} now (nats/token), "
            f"{summary['tokens_per_second']:,.0f} tokens/s"
        )
    if summary.get("skipped_shards"):  # runs of earlier versions do not have it
        lines.append(f"lost       {summary['skipped_shards']} shards of {summary['skipped_tokens']:,} tokens")
    if summary["validation_loss"] is not None:
        bits = "" if summary["bits_per_byte"] is None else f", {summary['bits_per_byte']:.4f} bits/byte"
        lines.append(f"held out   {summary['validation_loss']:.4f} nats/token{bits}")
    lines.append(f"checkpoint {summary['last_checkpoint']}")
    if summary["sample"] is not None:
        lines += ["it writes", *(f"  | {line}" for line in printable(summary["sample"]).splitlines())]
    return lines


def write_summary(trainer: Trainer, ending: StopReason) -> dict[str, Any]:
    """Writes ``summary.json`` into the run's folder (rank 0) and returns its content."""
    content = summarize(trainer, ending)
    if trainer.environment.is_main:
        write_json(trainer.run / "summary.json", content)
    return content
