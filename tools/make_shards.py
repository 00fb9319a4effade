"""Turn text into token shards for training: OUTPUT/train, and OUTPUT/validation for held-out documents.

Inputs are text files (a document each), JSONL files (.jsonl, .jsonl.gz, .jsonl.zst; a document a line), Parquet files
(a document a row) and folders of these.

    python tools/make_shards.py notes/ --suffix .md .txt --output data/notes --hold-out 0.02
    python tools/make_shards.py web.jsonl.zst --tokenizer tokenizer.json --output data/web --workers 16
    python tools/make_shards.py web/ --output data/web --pack best-fit --sequence-length 2048

A build that was interrupted, by whatever, goes on where it stopped when the same command is given again. The result is
the same, byte for byte, for any number of workers and interruptions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("inputs", nargs="+", help="files and folders of text, JSONL, Parquet")
    parser.add_argument("--output", required=True, help="folder to be made; appears when it is complete")
    parser.add_argument("--tokenizer", default="byte", help="'byte' (default) or the path of a tokenizer.json")
    parser.add_argument("--eos-token", help="the tokenizer.json's token that ends a document, if it cannot be told")
    parser.add_argument("--suffix", nargs="+", metavar="SUFFIX", help="files to take from folders, such as .py .md")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="files and folders to leave out")
    parser.add_argument("--text-field", default="text", help="JSONL field or Parquet column of the text")
    parser.add_argument("--hold-out", type=float, default=0.0, help="part of the documents to hold out")
    parser.add_argument("--shard-tokens", type=int, default=1 << 22, help="tokens a shard (default 4,194,304)")
    parser.add_argument("--bundle-tokens", type=int, default=1 << 16, help="tokens a sample (default 65,536)")
    parser.add_argument(
        "--pack",
        choices=("best-fit", "one-per-sequence"),
        help="pack documents into rows of a fixed length now, instead of when they are read",
    )
    parser.add_argument("--sequence-length", type=int, help="with --pack: data.sequence_length of the runs to come")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of documents over shards")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)"
    )
    parser.add_argument("--skip-undecodable", action="store_true", help="leave out documents that are not UTF-8")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are in OUTPUT already")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse_arguments(arguments))
    # After the arguments, since these take seconds and --help should not.
    from dcscale.data.errors import DataError
    from dcscale.data.prepare.build import build_shards
    from dcscale.data.prepare.documents import DEFAULT_SUFFIXES
    from dcscale.data.prepare.journal import state_folder

    inputs, output = options.pop("inputs"), options.pop("output")
    suffixes = options.pop("suffix") or DEFAULT_SUFFIXES
    started = time.perf_counter()
    try:
        report = build_shards(inputs, output, suffixes=suffixes, progress=True, **options)
    except (DataError, OSError, KeyboardInterrupt) as error:
        print(f"make_shards: {str(error) or 'interrupted'}", file=sys.stderr)
        path = Path(os.path.abspath(output))
        if path.name and os.path.exists(state := state_folder(path)):
            print(f"The same command goes on where it stopped; or to give up, remove {state}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1

    print(f"Made in {time.perf_counter() - started:.1f} s with {options['workers']} processes:")
    for folder, part in report.parts.items():
        totals = part.manifest.totals
        print(
            f"  {folder}: {totals['tokens']:,} tokens of {part.documents:,} documents "
            f"({totals['text_bytes']:,} bytes of text) in {len(part.manifest.shards):,} shards"
        )
        if row_tokens := part.manifest.row_tokens:
            print(
                f"    in {totals['tokens'] // row_tokens:,} rows of {row_tokens:,} tokens, "
                f"{1 - part.filling / totals['tokens']:.2%} of them filled; {part.cut:,} documents had to be cut"
            )
    if report.empty:
        print(f"Left out, since empty: {report.empty:,}")
    if report.undecodable:
        print(f"Left out, since not UTF-8: {len(report.undecodable):,}, such as {report.undecodable[0]}")
    print("To train on them, set (vocab_size may be larger):")
    settings = [f"data.{folder.name}={folder}" for folder in report.parts]
    vocab_size = next(iter(report.parts.values())).manifest.tokenizer.vocab_size
    settings += [f"data.sequence_length={options['sequence_length']}"] if options["pack"] else []
    print(f"  {' '.join(settings)} model.vocab_size={vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
