"""Convert a model between dcscale, upstream's DCFormer and DCPythia (Caiyun-AI/DCFormer), and Hugging Face.

    python tools/convert_checkpoint.py runs/mine models/mine --to dcscale --dtype bf16
    python tools/convert_checkpoint.py downloads/DCFormer-2.8B models/dcformer-2.8b --to dcscale
    python tools/convert_checkpoint.py models/mine exported/mine --to upstream --dry-run
    python tools/convert_checkpoint.py runs/mine exported/mine --to huggingface

The source is a run, a checkpoint, a model folder, or a folder with config.json and safetensors or .bin files that is
upstream's or was made with --to huggingface; the tool finds out and says which. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcscale.convert import DTYPES, FORMATS, ConversionError, check_target, prepare


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder to convert; it is only read")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write, which must not exist")
    parser.add_argument("--to", choices=FORMATS, required=True, help="what DST becomes")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the result's tensors (default: as in SRC)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; write nothing")
    parser.add_argument(
        "--from-copies",
        choices=("merged", "original"),
        help="upstream SRC: take dw_m, qkw_m or dw1, dd, qkw (default: the trained ones, found by their values)",
    )
    parser.add_argument(
        "--gelu",
        choices=("tanh", "erf"),
        help="upstream SRC: of the compose projection (default: erf if trained by upstream's PyTorch code, else tanh)",
    )
    parser.add_argument(
        "--local-keys",
        type=int,
        metavar="N",
        help="upstream SRC: keys a query of a local layer sees, itself included (default: window_size, one more if "
        "trained by upstream's PyTorch code)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model folder")
    options = parser.parse_args(arguments)
    try:
        check_target(options.source, options.target, options.overwrite)
        conversion = prepare(
            options.source,
            options.to,
            dtype=options.dtype,
            truth=options.from_copies,
            gelu=options.gelu,
            local_keys=options.local_keys,
        )
        print(f"{options.source} is: {conversion.found.words}", *conversion.lines(), sep="\n")
        if options.dry_run:
            print("dry run: nothing was written, and no values were checked")
            return 0
        conversion.write(options.target)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.target}: {len(conversion.plan.recipes)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
