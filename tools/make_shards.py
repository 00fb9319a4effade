"""Build token shards for training from text: OUTPUT/train, and OUTPUT/validation for held-out documents.

Inputs are text files (one document each), JSONL files (.jsonl, .jsonl.gz, .jsonl.zst; one document per line), Parquet
files (one document per row) and folders of these.

    python tools/make_shards.py notes/ --suffix .md .txt --output data/notes --hold-out 0.02
    python tools/make_shards.py web.jsonl.zst --tokenizer tokenizer.json --output data/web --workers 16
    python tools/make_shards.py web/ --output data/web --pack best-fit --sequence-length 2048

To resume an interrupted build, run the same command again. The result is the same byte for byte for any number of
workers and interruptions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from dcscale.cli import whole_number, whole_number_from_0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("inputs", nargs="+", help="files and folders of text, JSONL, Parquet")
    parser.add_argument("--output", required=True, help="folder to create; appears when it is complete")
    parser.add_argument("--tokenizer", default="byte", help="'byte' (default) or the path of a tokenizer.json")
    parser.add_argument("--eos-token", help="token of tokenizer.json that ends a document, if it cannot be detected")
    parser.add_argument("--suffix", nargs="+", metavar="SUFFIX", help="which files of folders to read, such as .py .md")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="files and folders to leave out")
    parser.add_argument("--text-field", default="text", help="JSONL field or Parquet column of the text")
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
    parser.add_argument("--skip-undecodable", action="store_true", help="leave out documents that are not UTF-8")
    parser.add_argument("--overwrite", action="store_true", help="replace existing shards in OUTPUT")
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
    if report.undecodable:
        print(f"Skipped documents that are not UTF-8: {len(report.undecodable):,}, such as {report.undecodable[0]}")
    print("To train on these shards, set (vocab_size may be larger):")
    settings = [f"data.{folder.name}={folder}" for folder in report.splits]
    vocab_size = next(iter(report.splits.values())).manifest.tokenizer.vocab_size
    settings += [f"data.sequence_length={options['sequence_length']}"] if options["pack"] else []
    print(f"  {' '.join(settings)} model.vocab_size={vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
