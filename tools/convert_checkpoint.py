"""Convert a model between dcscale, upstream's DCFormer and DCPythia (Caiyun-AI/DCFormer), and Hugging Face; or turn a
plain Transformer (Pythia, Llama, Qwen, Mistral) into a DCFormer whose compose is initially the identity.

    python tools/convert_checkpoint.py runs/mine models/mine --to dcscale --dtype bf16
    python tools/convert_checkpoint.py downloads/DCFormer-2.8B models/dcformer-2.8b --to dcscale
    python tools/convert_checkpoint.py downloads/pythia-410m models/dcpythia-410m --to dcscale
    python tools/convert_checkpoint.py downloads/SmolLM2-135M.Q8_0.gguf models/smollm --to dcscale
    python tools/convert_checkpoint.py maxtext/run models/dcformer --to dcscale --maxtext-config dcformer_pp_405m.yml
    python tools/convert_checkpoint.py models/mine exported/mine --to upstream --dry-run
    python tools/convert_checkpoint.py runs/mine exported/mine --to huggingface

The source is a run, a checkpoint, a model folder, a folder with config.json and safetensors or .bin files (upstream's,
of a plain Transformer, or made with --to huggingface), a GGUF file of a plain Transformer, or an Orbax checkpoint of
upstream's JAX training (MaxText); the tool detects and prints which. Only tensors are unpickled.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcscale.cli import MODEL_DTYPES, MODEL_TARGETS, add_source_options, source_options, whole_number_from_0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder, or GGUF file, to convert; it is only read")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write, which must not exist")
    parser.add_argument("--to", choices=MODEL_TARGETS, required=True, help="format of DST")
    parser.add_argument("--dtype", choices=MODEL_DTYPES, help="dtype of DST's tensors (default: as in SRC)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; write nothing")
    parser.add_argument(
        "--seed", type=whole_number_from_0, help="plain SRC: seed of the new compose weights (default: 0)"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="plain SRC: settings of DST, such as compose.rank=1, 'windows=[256,null]' or attention=mha: those of "
        "model.* in tools/check_config.py --reference",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model folder")
    add_source_options(parser)
    options = parser.parse_args(arguments)
    # Imported after the arguments are parsed: this takes seconds.
    from dcscale.convert import ConversionError, check_target, prepare

    try:
        check_target(options.source, options.target, options.overwrite)
        conversion = prepare(
            options.source,
            options.to,
            dtype=options.dtype,
            seed=options.seed,
            model=options.model,
            **source_options(options),
        )
        print(f"{options.source} is: {conversion.source.description}", *conversion.lines(), sep="\n")
        if options.dry_run:
            print("dry run: nothing was written, and no values were checked")
            return 0
        conversion.write(options.target)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.target}: {len(conversion.plan.rules)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
