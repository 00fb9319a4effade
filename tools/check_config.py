"""Checks whether a run would start, without starting it, and shows what follows from its settings.

    python tools/check_config.py configs/quickstart.yaml train.steps=200 --world-size 8
    python tools/check_config.py --reference

Checks the settings, and then what launch/train.py checks before it allocates the model: data, checkpoint, optimizer
rules and run folder. Shards and checkpoints are not read, only their manifests and sizes. Nothing is written.

Prints every problem and exits with 2; or, if there is none, prints every setting with its origin, the numbers that
follow from the settings, the generated DeepSpeed config, and warnings about settings that are probably not meant.
--reference prints all settings as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.cli import positive_number, whole_number
from dcscale.config import Config, ConfigError, Loaded, check_config, load_arguments, raise_problems
from dcscale.config.errors import show
from dcscale.config.reference import FIELDS, get, reference
from dcscale.lease import describe_holder

if TYPE_CHECKING:
    from dcscale.train.preflight import Preflight

UNFIT = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="FILE|key=value", help="later ones win; files come first")
    parser.add_argument("--world-size", type=whole_number, metavar="N", help="number of ranks (default: any)")
    parser.add_argument(
        "--no-data", action="store_true", help="data, checkpoint and run folder are not on this machine: leave them out"
    )
    parser.add_argument(
        "--device-gib",
        type=positive_number,
        metavar="N",
        help="memory of a GPU (default: that of this machine's, if any)",
    )
    parser.add_argument("--reference", action="store_true", help="print every setting with its meaning, and exit")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if options.reference:
        print(reference())
        return 0
    try:
        loaded = load_arguments([*options.settings, *unknown])
        raise_problems(check_config(loaded.config, options.world_size), loaded.origins)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return UNFIT
    try:
        found = check_start(loaded.config, options.world_size or 1, options.no_data)
    except ModuleNotFoundError as error:
        found, missing = None, error.name
    if found is None and not options.no_data:
        print(f"data and checkpoint cannot be checked: {missing} is not installed; give --no-data", file=sys.stderr)
        return UNFIT
    if found is not None and (reasons := found.reasons):
        print("\n  - ".join(["the run cannot start:", *reasons]), file=sys.stderr)
        return UNFIT
    print_settings(loaded)
    print_batches(loaded.config, options.world_size)
    if found is None:
        print(f"no parameter counts, DeepSpeed config, warnings and check of optimizer.rules: no {missing}")
        return 0
    print_model(loaded.config, found)
    print_deepspeed(loaded.config, options.world_size or 1)
    print_warnings(loaded.config, options.world_size or 1, found, options.device_gib)
    return 0


def check_start(config: Config, world_size: int, no_data: bool) -> Preflight:
    """What the run would start with, and the reasons why it cannot."""
    import torch

    from dcscale.parallel import Environment
    from dcscale.train.preflight import Preflight, check_rules, preflight

    if no_data:
        found = Preflight()
        found.attempt(lambda: check_rules(config))
        return found
    environment = Environment(0, 0, world_size, world_size, torch.device("cpu"))
    return preflight(config, environment, quick=True)


def print_settings(loaded: Loaded) -> None:
    """Every setting as ``path = value   # origin``, in columns, section by section."""
    rows = [(path, show(get(loaded.config, path)), loaded.origins[path]) for path in FIELDS]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    section = ""
    for path, value, origin in rows:
        if section not in ("", path.partition(".")[0]):
            print()
        section = path.partition(".")[0]
        print(f"{path:{widths[0]}} = {value:{min(widths[1], 40)}}  # {origin}")


def print_batches(config: Config, world_size: int | None) -> None:
    """Prints tokens, and how the ranks divide a step."""
    train, length = config.train, config.data.sequence_length
    tokens = train.global_batch_size * length
    print(f"\ntokens a step      {tokens:,}")
    print(f"tokens in all      {tokens * train.steps:,}")
    possible = [n for n in range(1, min(train.global_batch_size, 1024) + 1) if train.global_batch_size % n == 0]
    shown = []
    for ranks in [world_size] if world_size else possible:
        size = train.sequences_per_pass(ranks)
        shown.append(f"{train.global_batch_size // (ranks * size)} of {size} with {_ranks(ranks)}")
    print(f"micro-batches      of each rank, in sequences: {', '.join(shown)}")


def print_model(config: Config, found: Preflight) -> None:
    """Prints parameters, FLOPs, and how much of its data the run would use."""
    from dcscale.data import MixedStream
    from dcscale.models import count_flops, count_parameters

    length, sequences = config.data.sequence_length, config.train.steps * config.train.global_batch_size
    parameters, flops = count_parameters(config.model), count_flops(config.model, length)
    print(f"parameters         {parameters.total:,}, of which compose {parameters.compose:,}")
    print(f"FLOPs a token      {flops.total:.4g} (forward and backward)")
    print(f"FLOPs in all       {flops.total * sequences * length:.4g}")
    if found.data is None:
        return
    stream = found.data.stream
    sequences += _passed_over(found)
    epochs = stream.epochs(sequences)
    if not isinstance(stream, MixedStream):
        print(f"epochs             {epochs['']:.4g}")
        return
    for number, (name, share) in enumerate(zip(stream.names, stream.shares)):
        used = stream.planner.count(number, sequences)
        print(f"of source {name:8} {used:,} sequences ({share:.2%}), {epochs[name]:.4g} epochs")


def _passed_over(found: Preflight) -> int:
    """Sequences that the run has passed over in rollbacks."""
    return 0 if found.start is None else found.start.state.passed_over_sequences


def print_deepspeed(config: Config, world_size: int) -> None:
    """Prints the config that DeepSpeed is given."""
    from dcscale.parallel.deepspeed_config import deepspeed_config

    print(f"\nDeepSpeed config for {_ranks(world_size)}, generated:")
    print(json.dumps(deepspeed_config(config, world_size), indent=2))


def print_warnings(config: Config, world_size: int, found: Preflight, device_gib: float | None) -> None:
    """Prints what the start of the run would warn of."""
    import torch

    from dcscale.train.advice import advice

    memory = None if device_gib is None else int(device_gib * 2**30)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    stream = None if found.data is None else found.data.stream
    warnings = [
        *([] if stream is None else stream.warnings),
        *advice(config, world_size, stream, memory, _passed_over(found)),
    ]
    if found.start is not None and (holder := describe_holder(Path(config.run.folder))):
        warnings.append(holder)
    lines = [*(f"warning    {text}" for text in warnings), *(() if found.start is None else found.start.messages)]
    if lines:
        print("", *lines, sep="\n")


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


if __name__ == "__main__":
    sys.exit(main())
