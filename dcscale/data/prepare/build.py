"""From text to folders of shards: the whole way, in parallel, into a folder that appears when it is complete."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dcscale.data.errors import DataError
from dcscale.data.prepare.documents import DEFAULT_SUFFIXES, SourceFile, find_files, split
from dcscale.data.prepare.journal import Journal, state_folder
from dcscale.data.prepare.pool import Map, processes
from dcscale.data.prepare.shuffle import (
    PACKINGS,
    TRAIN,
    VALIDATION,
    Layout,
    SpoolTask,
    plan_shards,
    spool_chunk,
    write_planned_shard,
)
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from dcscale.data.tokenizers import Tokenizer, load_tokenizer

_BUCKET_BYTES = 1 << 28
"""Bytes of input for a bucket of the shuffle."""
_MOST_BUCKETS = 512
"""Each is two files of every worker."""
_STATE_VERSION = 1
"""To be raised whenever a build can no longer go on from what this code has left on disk."""


@dataclass(frozen=True)
class PartReport:
    """What became of the text of a part, train or validation."""

    manifest: Manifest

    documents: int
    """Documents of the part; those of the manifest are parts of documents, and filling, where they were packed."""

    cut: int
    """Documents that packing had to cut."""

    filling: int
    """Tokens that only fill rows."""


@dataclass(frozen=True)
class BuildReport:
    """What became of the text."""

    parts: dict[Path, PartReport]
    """Folder of shards -> what it holds."""

    empty: int
    """Documents without text, left out."""

    undecodable: tuple[str, ...]
    """Names of documents that are not UTF-8, left out; only with ``skip_undecodable``."""


def build_shards(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "byte",
    eos_token: str | None = None,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    exclude: Sequence[str] = (),
    text_field: str = "text",
    hold_out: float = 0.0,
    shard_tokens: int = 1 << 22,
    bundle_tokens: int = 1 << 16,
    pack: str | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    workers: int = 1,
    skip_undecodable: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    bucket_bytes: int = _BUCKET_BYTES,
) -> BuildReport:
    """Tokenise ``inputs`` into ``output/train`` and, for held-out documents, ``output/validation``.

    The result is the same byte for byte for any ``workers`` and ``bucket_bytes``, and however often it was interrupted:
    the same call goes on where one that was killed or that failed has stopped, see :mod:`dcscale.data.prepare.journal`.

    Args:
        inputs: text files (a document each), JSONL and Parquet files (a document a line or row), folders of them.
        output: folder to be made; it appears when everything in it is complete.
        tokenizer: ``byte``, or the path of a Hugging Face ``tokenizer.json``.
        eos_token: its token that ends a document, see :func:`dcscale.data.tokenizers.load_tokenizer`.
        suffixes: files of folders to take, see :func:`dcscale.data.prepare.documents.find_files`.
        exclude: patterns of names to leave out, see there.
        text_field: field of a JSONL object, or column of a Parquet file, that holds the text.
        hold_out: part of the documents that is held out, in [0, 1), chosen by their names alone.
        shard_tokens: tokens of a shard, at least, but for the last.
        bundle_tokens: tokens of a sample, at least, but for a shard's last.
        pack: ``best-fit`` or ``one-per-sequence`` packs the documents of each shard into rows, which are then in random
            order, see :mod:`dcscale.data.prepare.packing`; None leaves them as they are, to be packed when they are
            read.
        sequence_length: the ``data.sequence_length`` of the runs that will read the rows, which have a token more; only
            with ``pack``.
        seed: seed of the documents' order over the shards, and of the rows' order in them.
        workers: processes.
        skip_undecodable: leave out documents that are not UTF-8 instead of stopping.
        overwrite: replace ``output`` if it holds shards from an earlier call.
        progress: show progress bars, and say when an interrupted build is found.
        bucket_bytes: bytes of input for each bucket of the shuffle, see :mod:`dcscale.data.prepare.shuffle`.

    Raises:
        DataError: bad arguments, unreadable input, text without documents for train or validation, or an ``output``
            that is in the way. Half-made shards never become ``output``.
    """
    for name, value in {"shard_tokens": shard_tokens, "bundle_tokens": bundle_tokens, "workers": workers}.items():
        if value < 1:
            raise DataError(f"{name} is {value}, but must be at least 1")
    if not 0 <= hold_out < 1:
        raise DataError(f"hold_out is {hold_out}, but must be at least 0 and below 1")
    if pack is not None and pack not in PACKINGS:
        raise DataError(f"pack is {pack!r}, but must be {' or '.join(PACKINGS)}, or left out")
    if (pack is None) != (sequence_length is None) or (sequence_length is not None and sequence_length < 1):
        raise DataError(
            f"sequence_length is {sequence_length} and pack is {pack}, but with pack it must be at least 1, the "
            f"data.sequence_length of the runs that will read the rows, and without pack it must be left out"
        )
    output = Path(os.path.abspath(output))
    if not output.name:
        raise DataError(f"{output}: is no folder that could be made; give another output")
    loaded = load_tokenizer(tokenizer, eos_token)
    files = find_files(inputs, suffixes=suffixes, exclude=[*exclude, glob.escape(state_folder(output).name)])
    total_bytes = sum(file.bytes for file in files)
    buckets = min(max(1, total_bytes // bucket_bytes), _MOST_BUCKETS)
    # Not skip_undecodable: a build that such a document has stopped goes on when they are allowed.
    identity = {
        "state": _STATE_VERSION,
        "tokenizer": loaded.fingerprint,
        "eos_token": loaded.eos_id,
        "text_field": text_field,
        "hold_out": hold_out,
        "shard_tokens": shard_tokens,
        "bundle_tokens": bundle_tokens,
        "pack": pack,
        "sequence_length": sequence_length,
        "seed": seed,
        "buckets": buckets,
        "input_files": len(files),
        "input_bytes": total_bytes,
        "input_paths_sizes_and_times": _fingerprint(files),
    }
    building = Journal(output, identity)
    task = SpoolTask(
        spool=building.spool,
        run=secrets.token_hex(4),
        tokenizer=loaded.spec,
        fingerprint=loaded.fingerprint,
        eos_token=eos_token,
        dtype="uint16" if loaded.vocab_size <= 1 << 16 else "uint32",
        text_field=text_field,
        skip_undecodable=skip_undecodable,
        hold_out=hold_out,
        seed=seed,
        buckets=buckets,
    )
    layout = Layout(task.dtype, bundle_tokens, loaded.eos_id, seed, pack, sequence_length and sequence_length + 1)
    parts = (TRAIN, VALIDATION) if hold_out else (TRAIN,)
    with building, processes(workers) as run:
        _check_output(output, overwrite)
        _check_state(building, skip_undecodable, progress)
        if not building.complete:
            _spool(building, task, files, run, progress)
            for part in parts:
                _write_part(building, part, layout, shard_tokens, loaded, run, progress)
            building.end()
        report = _report(building, output, parts)
        building.publish()
    return report


def _fingerprint(files: Sequence[SourceFile]) -> str:
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(json.dumps([os.path.abspath(file.path), file.name, file.bytes, file.modified]).encode())
    return hashed.hexdigest()


def _check_state(building: Journal, skip_undecodable: bool, progress: bool) -> None:
    """Say what interrupted builds there are, and refuse to go on with one that has left out more than is allowed."""
    undecodable = [name for chunk in building.chunks.values() for name in chunk.undecodable]
    if undecodable and not skip_undecodable:
        raise DataError(
            f"{building.folder}: is this build, interrupted, and {undecodable[0]} was left out of it with "
            f"--skip-undecodable; use that again, or remove the folder to start anew"
        )
    if progress and building.started:
        done = (
            f"{len(building.chunks):,} pieces of text and {sum(map(len, building.shards.values())):,} shards are done"
        )
        tqdm.write(f"Going on with the build that was interrupted: {done}.", file=sys.stderr)
    for other in building.differences_of_others() if progress else ():
        message = "Starting anew: an interrupted build is another one. It is kept until this one is complete."
        tqdm.write(f"{message}\n  {other}", file=sys.stderr)


def _spool(building: Journal, task: SpoolTask, files: Sequence[SourceFile], run: Map, progress: bool) -> None:
    """First pass, or what is left of it."""
    if building.all_spooled:
        return
    done = building.chunks
    total, initial = sum(file.bytes for file in files), sum(chunk.bytes for chunk in done.values())
    numbered = enumerate(split(files, text_field=task.text_field))
    missing = ((number, chunk) for number, chunk in numbered if number not in done)
    with tqdm(desc="tokenize", total=total, initial=initial, unit="B", unit_scale=True, disable=not progress) as bar:
        for chunk in run(partial(spool_chunk, task), missing):
            building.add_chunk(chunk)
            bar.update(chunk.bytes)
    building.end_spooling()


def _write_part(
    building: Journal, part: str, layout: Layout, shard_tokens: int, tokenizer: Tokenizer, run: Map, progress: bool
) -> None:
    """Second pass over a part, or what is left of it."""
    folder, done = building.result / part, building.shards[part]
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*"):
        unfinished.unlink()
    plans = plan_shards(building.spool, part, shard_tokens, building.chunks.values())
    missing = (plan for plan in plans if plan.name not in done)
    total = sum(chunk.documents[part] for chunk in building.chunks.values())
    initial = sum(shard.documents for shard in done.values())
    with tqdm(desc=f"write {part}", total=total, initial=initial, unit=" documents", disable=not progress) as bar:
        for shard in run(partial(write_planned_shard, folder, layout), missing):
            building.add_shard(part, shard)
            bar.update(shard.documents)
    if not done:
        if not any(sum(chunk.documents.values()) for chunk in building.chunks.values()):
            raise DataError("the inputs hold no text: all their documents are empty or left out; give other inputs")
        raise DataError(
            f"the inputs give no document for {part}: in which part a document is follows from its name alone; "
            f"give more text, or another --hold-out"
        )
    largest = max(shard.max_token_id for shard in done.values())
    shards = tuple(shard.info for shard in done.values())
    write_manifest(
        folder, Manifest(layout.dtype, tokenizer.save(folder), largest, shards, row_tokens=layout.row_tokens)
    )


def _report(building: Journal, output: Path, parts: Sequence[str]) -> BuildReport:
    reports = {}
    for part in parts:
        shards = building.shards[part].values()
        sums = (sum(getattr(shard, name) for shard in shards) for name in ("documents", "cut", "filling"))
        reports[output / part] = PartReport(read_manifest(building.result / part), *sums)
    chunks = building.chunks.values()
    undecodable = sorted(name for chunk in chunks for name in chunk.undecodable)
    return BuildReport(reports, sum(chunk.empty for chunk in chunks), tuple(undecodable))


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way; only what build_shards wrote is ever overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{output}: exists already; give another output, or --overwrite to replace earlier shards")
    if not output.is_dir() or any(
        child.name not in (TRAIN, VALIDATION) or not (child / MANIFEST_NAME).is_file() for child in output.iterdir()
    ):
        raise DataError(f"{output}: holds other things than shards, so it is not overwritten; give another output")
