"""Inspect shards: verify them, show some of their documents, or write a manifest for third-party tars.

    python tools/inspect_shards.py data/web/train                         # read everything, report every defect
    python tools/inspect_shards.py data/web/train --samples 5             # show documents as text
    python tools/inspect_shards.py tars/ --write-manifest --tokenizer tokenizer.json

A PATH is a folder or address of shards with their manifest, or a single tar of such a folder. Verifying reads every
shard and compares size, checksum, counts, token ids and the ends of rows. The exit status is 1 if anything is wrong.

--write-manifest makes third-party tars usable as they are: tars of tokens as KEY.tokens.npy (with KEY.lens.npy, or one
document each) or KEY.npy, and tars of text as KEY.txt or as a field of KEY.json. Other members, such as images, are
ignored. Text is tokenized whenever it is read, at about 0.3 million tokens per second and thread: fine for small data;
for a large run, unpack the text and build shards from it with tools/make_shards.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from itertools import islice
from pathlib import Path

from dcscale.cli import add_bad_row_options, whole_number

MAX_CHARACTERS = 2000


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder or address of shards, or tars")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--samples", type=whole_number, metavar="N", help="show the first N documents instead of verifying"
    )
    what.add_argument(
        "--write-manifest", action="store_true", help="write a manifest for a folder of tars, or for tars"
    )
    parser.add_argument("--tokenizer", help="with --write-manifest: 'byte' or the path of a tokenizer.json")
    parser.add_argument("--eos-token", help="token of tokenizer.json that ends a document, if it cannot be detected")
    parser.add_argument(
        "--text-member", choices=("txt", "json"), help="members that hold the text (default: detected in the first tar)"
    )
    parser.add_argument("--text-field", default="text", help="field of a .json member that holds the text")
    add_bad_row_options(parser)
    parser.add_argument(
        "--workers", type=whole_number, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)"
    )
    options = parser.parse_args(arguments)
    if options.write_manifest != (options.tokenizer is not None):
        parser.error("--tokenizer is needed for --write-manifest, and for nothing else")
    for_manifest = (options.eos_token, options.text_member, options.on_bad_row == "skip")
    if any(for_manifest) and not options.write_manifest:
        parser.error("--eos-token, --text-member and --on-bad-row are for --write-manifest only; leave them out")
    return options


def roots_of(paths: list[str]) -> dict[str, list[str] | None]:
    """Roots of shards -> names of the shards to read, or None for all."""
    from dcscale.data.errors import DataError
    from dcscale.data.shards.manifest import MANIFEST_NAME

    roots: dict[str, list[str] | None] = {}
    for path in paths:
        if not path.endswith(".tar"):
            roots[path] = None
            continue
        folder = next((folder for folder in Path(path).parents if (folder / MANIFEST_NAME).is_file()), None)
        if folder is None:
            raise DataError(
                f"{path}: has no {MANIFEST_NAME} next to it or in a parent folder; write one with --write-manifest"
            )
        names = roots.setdefault(str(folder), [])
        if names is not None:
            names.append(Path(path).relative_to(folder).as_posix())
    return roots


def verify(paths: list[str], workers: int) -> bool:
    from dcscale.data.prepare.inspect import inspect_shards

    good = True
    for root, names in roots_of(paths).items():
        found = inspect_shards(root, names, workers=workers, progress=True)
        report(found)
        good = good and not found.defects
    return good


def show_samples(paths: list[str], count: int) -> bool:
    from dcscale.data.prepare.inspect import sample_documents
    from dcscale.observe import printable

    for root, names in roots_of(paths).items():
        for document in islice(sample_documents(root, names), count):
            text = document.text[:MAX_CHARACTERS]
            left = len(document.text) - len(text)
            print(f"---- {document.shard}, document {document.number}: {document.tokens:,} tokens")
            print(printable(text) + (f"... ({left:,} more characters)" if left else ""))
    return True


def write_manifest(options: argparse.Namespace) -> bool:
    from dcscale.data.errors import DataError
    from dcscale.data.prepare.index import index_tars

    paths = [Path(path).absolute() for path in options.paths]
    folder, tars = paths[0], sorted(paths[0].rglob("*.tar"))
    if not folder.is_dir():
        if strange := [path for path in options.paths if not Path(path).is_file()]:
            raise DataError(f"{strange[0]}: is not a local file; give one folder, or only tars")
        folder, tars = Path(os.path.commonpath([path.parent for path in paths])), sorted(paths)
    elif len(paths) > 1:
        raise DataError(f"{paths[1]}: is given together with a folder; give one folder, or only tars")
    chosen = {
        name: getattr(options, name)
        for name in ("tokenizer", "eos_token", "text_member", "text_field", "on_bad_row", "max_bad_rows", "workers")
    }
    found = index_tars(folder, tars, **chosen, progress=True)
    report(found)
    if found.defects:
        print(f"{folder}: no manifest was written; repair or remove the tars named above")
        return False
    vocab_size = found.manifest.tokenizer.vocab_size
    settings = shlex.join([f"data.train={folder}", f"model.vocab_size={vocab_size}"])
    print(f"Wrote the manifest. To train on it: {settings}")
    if found.manifest.text:
        print("The text is tokenized whenever it is read: for a large run, unpack it and use tools/make_shards.py.")
    return True


def report(found) -> None:
    print("\n".join(found.summary()))
    for defect in found.defects:
        print(f"inspect_shards: {defect}", file=sys.stderr)
    print(f"  verdict     {f'{len(found.defects):,} defects' if found.defects else 'no defects'}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # After the arguments, since these take seconds and --help should not.
    from dcscale.data.errors import DataError

    try:
        if options.write_manifest:
            good = write_manifest(options)
        elif options.samples:
            good = show_samples(options.paths, options.samples)
        else:
            good = verify(options.paths, options.workers)
    except (DataError, OSError) as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
