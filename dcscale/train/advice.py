"""Warnings about settings that a run can start with, but that are probably not meant. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

from dcscale.config import Config, Problem
from dcscale.data import MixedStream, Stream
from dcscale.models import count_parameters

MOST_EPOCHS = 4
"""Up to so many epochs, repeated data is worth about as much as new data (Muennighoff et al., arXiv 2305.16264)."""

_USUAL_LEARNING_RATES = {
    0: 1e-3,
    125e6: 6e-4,
    350e6: 3e-4,
    760e6: 2.5e-4,
    1.3e9: 2e-4,
    2.7e9: 1.6e-4,
    6.7e9: 1.2e-4,
    13e9: 1e-4,
    175e9: 0.6e-4,
}
"""Peak learning rate by parameters: GPT-3 (Brown et al., arXiv 2005.14165, table 2.1), which Pythia took over; below
125M that of Pythia-31M (EleutherAI/pythia, models/31M/pythia-31m.yml)."""

LEARNING_RATE_FACTOR = 10
"""How far a learning rate may be above the usual one: wide, so that other recipes and batches give no warning."""


def advice(
    config: Config, world_size: int, stream: Stream | None, device_bytes: int | None, passed_over: int = 0
) -> list[str]:
    """Warnings, each with the setting, its value, the rule and the way out.

    Args:
        config: the settings of the run, which must have passed :func:`dcscale.config.check_config`.
        world_size: number of ranks.
        stream: the training data; None if it is not at hand.
        device_bytes: memory of the smallest device; None if it is not known.
        passed_over: sequences that the run has passed over in rollbacks.
    """
    found = [*_learning_rate(config), *_passes(config, world_size), *_validation(config), *_rollback(config)]
    if stream is not None:
        found += _data(config, stream, passed_over)
    if device_bytes is not None:
        found += _memory(config, world_size, device_bytes)
    return [str(problem) for problem in found]


def _learning_rate(config: Config) -> Iterator[Problem]:
    parameters, rate = count_parameters(config.model).total, config.optimizer.learning_rate
    usual = next(usual for size, usual in reversed(_USUAL_LEARNING_RATES.items()) if size <= parameters)
    if rate > LEARNING_RATE_FACTOR * usual:
        rule = f"is more than {LEARNING_RATE_FACTOR} times what models of {parameters:,} parameters are trained with"
        yield Problem("optimizer.learning_rate", rate, rule, f"GPT-3 and Pythia used {usual:g} at this size")


def _passes(config: Config, world_size: int) -> Iterator[Problem]:
    train = config.train
    share = train.global_batch_size // world_size
    taken, wanted = train.sequences_per_pass(world_size), min(train.micro_batch_size, share)
    if 2 * taken < wanted:
        rule = f"becomes {taken}, the largest divisor of the {share} sequences of a rank, which is slow"
        fix = f"use a train.global_batch_size of {world_size * wanted * max(1, round(share / wanted))}"
        yield Problem("train.micro_batch_size", train.micro_batch_size, rule, fix)


def _validation(config: Config) -> Iterator[Problem]:
    interval, steps = config.validation.interval, config.train.steps
    if config.data.validation is not None and interval == 0:
        yield Problem("validation.interval", 0, "leaves data.validation unused", "set it, or data.validation=null")
    if interval > steps:
        rule = f"is more than train.steps = {steps}: validated only at the end"
        yield Problem("validation.interval", interval, rule, "lower it to see progress")


def _rollback(config: Config) -> Iterator[Problem]:
    saving = config.checkpoint
    if config.train.on_spike == "rollback" and not saving.interval and saving.interval_minutes is None:
        rule = "has no checkpoint to go back to: checkpoint.interval is 0, so only the end of a start writes one"
        yield Problem("train.on_spike", "rollback", rule, "set checkpoint.interval or checkpoint.interval_minutes")


def _data(config: Config, stream: Stream, passed_over: int) -> Iterator[Problem]:
    batch, steps = config.train.global_batch_size, config.train.steps
    epochs = stream.epochs(steps * batch + passed_over)
    for number, (name, source) in enumerate(zip(stream.names, stream.sources)):
        path, value = ("data.train", config.data.train)
        if isinstance(stream, MixedStream):
            path, value = f"data.sources[{number}].path", config.data.sources[number].path
        in_epoch, in_step = source.order.sequences_per_epoch, stream.planner.count(number, batch)
        if in_step > in_epoch:
            rule = f"has {in_epoch:,} sequences, fewer than the {in_step:,} of one step: a step repeats its data"
            yield Problem(path, value, rule, "give more data, or lower train.global_batch_size")
        elif epochs[name] > MOST_EPOCHS:
            rule = f"is read {epochs[name]:.1f} times; beyond about {MOST_EPOCHS}, repeated data is worth much less"
            most = int(steps * MOST_EPOCHS / epochs[name])
            yield Problem(path, value, rule, f"give more data, or set train.steps to at most {most}")


def _memory(config: Config, world_size: int, device_bytes: int) -> Iterator[Problem]:
    needed = state_bytes(config, world_size)
    if needed > device_bytes:
        stage = config.parallel.zero_stage
        rule = (
            f"weights, gradients and optimizer states alone take {needed / 2**30:.1f} GiB on each of {world_size} "
            f"ranks, but a device has {device_bytes / 2**30:.1f} GiB"
        )
        ways = [] if stage == 3 else ["a higher stage"]
        ways += [] if config.parallel.offload_optimizer else ["parallel.offload_optimizer=true"]
        yield Problem("parallel.zero_stage", stage, rule, f"use {', '.join([*ways, 'more ranks or a smaller model'])}")


def state_bytes(config: Config, world_size: int) -> int:
    """Least memory of a rank's device for the training state, in bytes; activations and buffers come on top.

    Of each parameter: the weight w = 2 bytes in bf16 or 4 in fp32, the gradient g = 4 as micro-batches are summed in
    float32, and o = 12 for AdamW's moments and the float32 master weight (8 without ZeRO in fp32, where the weight is
    the master). With N ranks, ZeRO stage 0 holds w + g + o, 1: w + g + o / N, 2: w + (g + o) / N, 3: (w + g + o) / N.
    ``offload_optimizer`` keeps g and o in host memory.
    """
    stage, bf16 = config.parallel.zero_stage, config.train.precision == "bf16"
    weight, gradient = 2 if bf16 else 4, 4
    states = 8 if stage == 0 and not bf16 else 12
    if config.parallel.offload_optimizer:
        gradient = states = 0
    parts = [world_size if stage >= least else 1 for least in (3, 2, 1)]
    each = sum(size / part for size, part in zip((weight, gradient, states), parts))
    return int(each * count_parameters(config.model).total)
