"""Checks a config without building anything, and shows what follows from it.

    python tools/check_config.py configs/quickstart.yaml train.steps=200 --world-size 8
    python tools/check_config.py --reference

Prints every problem and exits with 1; or, if there is none, prints every setting with its origin, the numbers that
follow from the settings, and the generated DeepSpeed config. --reference prints all settings as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys

from dcscale.cli import whole_number
from dcscale.config import Config, ConfigError, Loaded, check_config, load_config, raise_problems
from dcscale.config.errors import show
from dcscale.config.reference import FIELDS, get, reference


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="FILE|key=value", help="later ones win; files come first")
    parser.add_argument("--world-size", type=whole_number, metavar="N", help="number of ranks (default: any)")
    parser.add_argument("--reference", action="store_true", help="print every setting with its meaning, and exit")
    options = parser.parse_intermixed_args(arguments)
    if options.reference:
        print(reference())
        return 0
    try:
        overrides = [text for text in options.settings if "=" in text]
        loaded = load_config([text for text in options.settings if "=" not in text], overrides)
        raise_problems(check_config(loaded.config, options.world_size), loaded.origins)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print_settings(loaded)
    print_numbers(loaded.config, options.world_size)
    return 0


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


def print_numbers(config: Config, world_size: int | None) -> None:
    """Prints tokens, accumulation, parameters, FLOPs, epochs and the DeepSpeed config."""
    train, length = config.train, config.data.sequence_length
    tokens = train.global_batch_size * length
    print(f"\ntokens a step      {tokens:,}")
    print(f"tokens in all      {tokens * train.steps:,}")
    batches = train.global_batch_size // train.micro_batch_size
    ranks = [world_size] if world_size else [n for n in range(1, min(batches, 1024) + 1) if batches % n == 0]
    print(f"micro-batches      {', '.join(f'{batches // n} x {_ranks(n)}' for n in ranks)}")
    try:
        from dcscale.models import count_flops, count_parameters
        from dcscale.parallel.deepspeed_config import deepspeed_config
    except ModuleNotFoundError as error:
        print(f"no parameter counts and no DeepSpeed config: {error.name} is not installed")
        return
    parameters, flops = count_parameters(config.model), count_flops(config.model, length)
    print(f"parameters         {parameters.total:,}, of which compose {parameters.compose:,}")
    print(f"FLOPs a token      {flops.total:.4g} (forward and backward)")
    print(f"FLOPs in all       {flops.total * tokens * train.steps:.4g}")
    print_epochs(config)
    print(f"\nDeepSpeed config for {_ranks(world_size or 1)}, generated:")
    print(json.dumps(deepspeed_config(config, world_size or 1), indent=2))


def print_epochs(config: Config) -> None:
    """Prints how much of each source the run would use, if the training data is on this machine."""
    from dcscale.data import DataError, MixedStream
    from dcscale.train.data import open_training_stream

    if any("://" in root for root in config.data.roots):
        return
    try:
        stream = open_training_stream(config)
    except DataError as error:
        print(f"epochs             unknown: {error}")
        return
    sequences = config.train.steps * config.train.global_batch_size
    epochs = stream.epochs(sequences)
    if not isinstance(stream, MixedStream):
        print(f"epochs             {epochs['']:.4g}")
        return
    for number, (name, share) in enumerate(zip(stream.names, stream.shares)):
        used = stream.planner.count(number, sequences)
        print(f"of source {name:8} {used:,} sequences ({share:.2%}), {epochs[name]:.4g} epochs")


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


if __name__ == "__main__":
    sys.exit(main())
