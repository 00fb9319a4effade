"""Build token shards for training from text: OUTPUT/train, and OUTPUT/validation for held-out documents.

    python tools/make_shards.py notes/ --suffix .md .txt --output data/notes --hold-out 0.02
    python tools/make_shards.py web.jsonl.zst --tokenizer tokenizer.json --output data/web --workers 16
    python tools/make_shards.py web/ --output data/web --pack best-fit --sequence-length 2048
    python tools/make_shards.py site/ --suffix .html --format text --output data/site

Inputs are files and folders. The suffix of a file, in upper or lower case, says what it is:
  .jsonl .ndjson .json       JSON: an object on each line, or one array of objects; one document each
                             (also .gz; .zst with the package backports.zstd)
  .parquet                   one document a row (with the package pyarrow)
  .txt .md .rst .tex and source code such as .py .c .java .rs .js
                             plain text: one document a file
Any other file (.html .csv .xml ...) is refused unless --format states what all files are. Of folders, JSON, Parquet and
.txt are read, or what --suffix names; what is not read is counted and printed.

To resume an interrupted build, run the same command again. The result is the same byte for byte for any number of
workers and interruptions, and wherever the inputs are.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from dcscale.cli import add_bad_row_options, whole_number, whole_number_from_0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("inputs", nargs="+", help="files and folders of text, JSON, Parquet")
    parser.add_argument("--output", required=True, help="folder to create; appears when it is complete")
    parser.add_argument("--tokenizer", default="byte", help="'byte' (default), or a tokenizer.json or its folder")
    parser.add_argument("--eos-token", help="token of tokenizer.json that ends a document, if it cannot be detected")
    parser.add_argument(
        "--suffix", action="extend", nargs="+", metavar="SUFFIX", help="which files of folders to read, such as .py .md"
    )
    parser.add_argument(
        "--format", choices=("json", "parquet", "text"), help="format of all files, whatever their suffix"
    )
    parser.add_argument(
        "--exclude", action="extend", nargs="+", default=[], metavar="NAME", help="files and folders to leave out"
    )
    parser.add_argument("--text-field", default="text", help="JSON field or Parquet column of the text")
    parser.add_argument("--hold-out", type=float, default=0.0, help="fraction of the documents in OUTPUT/validation")
    parser.add_argument(
        "--shard-tokens", type=whole_number, default=1 << 22, help="minimum tokens per shard (default 4,194,304)"
    )
    parser.add_argument(
        "--bundle-tokens", type=whole_number, default=1 << 16, help="minimum tokens per sample (default 65,536)"
    )
    parser.add_argument(
        "--pack",
        choices=("best-fit", "one-per-sequence"),
        help="pack documents into rows of a fixed length now, instead of when they are read",
    )
    parser.add_argument("--sequence-length", type=whole_number, help="with --pack: data.sequence_length of the runs")
    parser.add_argument(
        "--seed", type=whole_number_from_0, default=0, help="seed of the order of documents over shards"
    )
    parser.add_argument(
        "--workers", type=whole_number, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)"
    )
    add_bad_row_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace existing shards in OUTPUT")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse_arguments(arguments))
    # After the arguments, since these take seconds and --help should not.
    from dcscale.data.errors import DataError
    from dcscale.data.prepare.build import build_shards
    from dcscale.data.prepare.journal import state_folder

    inputs, output = options.pop("inputs"), options.pop("output")
    started = time.perf_counter()
    try:
        report = build_shards(inputs, output, suffixes=options.pop("suffix"), progress=True, **options)
    except (DataError, OSError, KeyboardInterrupt) as error:
        print(f"make_shards: {str(error) or 'interrupted'}", file=sys.stderr)
        path = Path(os.path.abspath(output))
        if path.name and os.path.exists(state := state_folder(path)):
            print(f"To resume, run the same command again; to discard the build, remove {state}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1

    print(f"Built in {time.perf_counter() - started:.1f} s with {options['workers']} processes:")
    for folder, split in report.splits.items():
        totals = split.manifest.totals
        print(
            f"  {folder}: {totals['tokens']:,} tokens of {split.documents:,} documents "
            f"({totals['text_bytes']:,} bytes of text) in {len(split.manifest.shards):,} shards"
        )
        if row_tokens := split.manifest.row_tokens:
            print(
                f"    in {totals['tokens'] // row_tokens:,} rows of {row_tokens:,} tokens, "
                f"{1 - split.padding_tokens / totals['tokens']:.2%} filled; "
                f"{split.cut_documents:,} documents were cut because they are longer than a row"
            )
    if report.empty:
        print(f"Skipped empty documents: {report.empty:,}")
    if report.skipped.by_reason:
        print(f"Skipped: {report.skipped}")
    if report.not_read.kinds:
        print(f"Not read: {report.not_read}")
    print("To train on these shards, set (vocab_size may be larger):")
    settings = [f"data.{folder.name}={folder}" for folder in report.splits]
    vocab_size = next(iter(report.splits.values())).manifest.tokenizer.vocab_size
    settings += [f"data.sequence_length={options['sequence_length']}"] if options["pack"] else []
    print(f"  {shlex.join([*settings, f'model.vocab_size={vocab_size}'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
