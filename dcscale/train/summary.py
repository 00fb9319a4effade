"""``summary.json``: a run's result in one small file."""

from __future__ import annotations

from typing import Any

from dcscale.files import write_json
from dcscale.models import count_parameters
from dcscale.observe import printable
from dcscale.train.hooks import Samples, Validation
from dcscale.train.trainer import Ending, Trainer


def summarize(trainer: Trainer, ending: Ending) -> dict[str, Any]:
    """The summary's content.

    ``tokens`` counts tokens read in training over all ranks; losses are in nats a token, ``bits_per_byte``
    in bits a byte of held-out text; ``tokens_per_second`` is over the training steps of all starts of the
    run; ``completed`` tells whether ``train.steps`` was reached.
    """
    state = trainer.state
    validation = next((hook.last for hook in trainer.hooks if isinstance(hook, Validation)), {})
    sample = next((hook.last for hook in trainer.hooks if isinstance(hook, Samples)), None)
    return {
        "completed": ending is Ending.COMPLETED,
        "steps": state.step,
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
        "validation_loss": validation.get("validation_loss"),
        "bits_per_byte": validation.get("bits_per_byte"),
        "tokens_per_second": state.tokens / state.train_seconds if state.train_seconds else None,
        "train_seconds": state.train_seconds,
        "skipped_shards": len(state.skipped),
        "skipped_tokens": sum(shard["tokens"] for shard in state.skipped),
        "parameters": count_parameters(trainer.config.model).total,
        "world_size": trainer.environment.world_size,
        "device": str(trainer.environment.device.type),
        "last_checkpoint": str(trainer.latest_checkpoint) if trainer.latest_checkpoint else None,
        "sample": sample or None,
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


def write_summary(trainer: Trainer, ending: Ending) -> dict[str, Any]:
    """Writes ``summary.json`` into the run's folder (rank 0) and returns its content."""
    content = summarize(trainer, ending)
    if trainer.environment.is_main:
        write_json(trainer.run / "summary.json", content)
    return content
