"""Build token shards from text, in parallel and resumable; the output folder appears only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dcscale.data.bad_rows import SkippedRows, check_policy
from dcscale.data.errors import DataError
from dcscale.data.prepare.documents import CHUNK_BYTES, split_into_chunks
from dcscale.data.prepare.journal import Journal, state_folder
from dcscale.data.prepare.pool import PoolMap, worker_pool
from dcscale.data.prepare.shuffle import (
    PACKINGS,
    TRAIN,
    VALIDATION,
    ShardLayout,
    SpooledChunk,
    SpoolTask,
    plan_shards,
    spool_chunk,
    write_planned_shard,
)
from dcscale.data.prepare.sources import FORMATS, NotRead, SourceFile, find_files
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest, token_dtype, write_manifest
from dcscale.data.tokenizers import Tokenizer, load_tokenizer

_BUCKET_BYTES = 1 << 28
"""Bytes of input for each bucket of the shuffle."""
_MAX_BUCKETS = 512
"""Every worker keeps two spool files per bucket."""
_STATE_VERSION = 2
"""Increment it when a build can no longer resume from the state that earlier code left on disk."""


@dataclass(frozen=True)
class SplitReport:
    """What was written for one split, train or validation."""

    manifest: Manifest

    documents: int
    """Input documents of the split. With packing, the manifest counts fragments of documents and padding instead."""

    cut_documents: int
    """Documents that packing cut, because they are longer than a row."""

    padding_tokens: int
    """End-of-document tokens that only fill rows."""


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote and what it left out."""

    splits: dict[Path, SplitReport]
    """Folder of shards -> what it holds."""

    empty: int
    """Number of documents that were left out because they have no text."""

    skipped: SkippedRows
    """Rows that were left out because they cannot be used; only with ``on_bad_row="skip"``."""

    not_read: NotRead
    """Files of the input folders that were not read."""


def build_shards(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "byte",
    eos_token: str | None = None,
    suffixes: Sequence[str] | None = None,
    format: str | None = None,
    exclude: Sequence[str] = (),
    text_field: str = "text",
    hold_out: float = 0.0,
    shard_tokens: int = 1 << 22,
    bundle_tokens: int = 1 << 16,
    pack: str | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    workers: int = 1,
    on_bad_row: str = "fail",
    max_bad_rows: float = 0.01,
    overwrite: bool = False,
    progress: bool = False,
    bucket_bytes: int = _BUCKET_BYTES,
    batch_chars: int = CHUNK_BYTES,
) -> BuildReport:
    """Tokenize ``inputs`` into ``output/train`` and, for held-out documents, ``output/validation``.

    The result is the same byte for byte for any ``workers``, ``bucket_bytes`` and ``batch_chars`` and for any number of
    interruptions. To resume a build that was killed or that failed, make the same call again; see
    :mod:`dcscale.data.prepare.journal`.

    Args:
        inputs: text files (one document each), JSON files (one document per line, or per element of an array), Parquet
            files (one per row), or folders of them.
        output: folder to create; it appears when everything in it is complete.
        tokenizer: ``byte``, or the path of a Hugging Face ``tokenizer.json``.
        eos_token: token of the tokenizer that ends a document, see :func:`dcscale.data.tokenizers.load_tokenizer`.
        suffixes: which files of a folder to read, see :func:`dcscale.data.prepare.sources.find_files`.
        format: the format of all files, see ``find_files``; None: by the suffix of each.
        exclude: patterns of file and folder names to leave out, see ``find_files``.
        text_field: field of a JSON object, or column of a Parquet file, that holds the text.
        hold_out: fraction of the documents in the validation split, in [0, 1); chosen by their names alone,
            see :mod:`dcscale.data.prepare.sources`.
        shard_tokens: minimum tokens of a shard; the last one may be smaller.
        bundle_tokens: minimum tokens of a sample; the last one of a shard may be smaller.
        pack: ``best-fit`` or ``one-per-sequence`` packs the documents of each shard into rows in random order, see
            :mod:`dcscale.data.prepare.packing`; None keeps documents as they are, to be packed when they are read.
        sequence_length: the ``data.sequence_length`` of the runs that will read the rows, which have one token more;
            only with ``pack``.
        seed: seed of the order of documents over the shards, and of the order of rows within a shard.
        workers: number of processes.
        on_bad_row: ``fail`` stops at a row without valid text, ``skip`` leaves it out and counts it, see
            :mod:`dcscale.data.bad_rows`.
        max_bad_rows: with ``skip``, the fraction of the rows that may be bad; 100 always may.
        overwrite: replace ``output`` if it holds shards from an earlier call.
        progress: show progress bars, and report files that are not read and interrupted builds of the same output.
        bucket_bytes: bytes of input for each bucket of the shuffle, see :mod:`dcscale.data.prepare.shuffle`.
        batch_chars: characters of text that a worker tokenizes together.

    Raises:
        DataError: an argument is invalid, an input cannot be read or is given twice, a split gets no document, or
            ``output`` is in the way. Incomplete shards never become ``output``.
    """
    _check_sizes(shard_tokens=shard_tokens, bundle_tokens=bundle_tokens, workers=workers)
    _check_choices(hold_out, pack, sequence_length, format, on_bad_row, max_bad_rows)
    output = Path(os.path.abspath(output))
    if not output.name:
        raise DataError(f"{output}: is not a folder that can be created; give another output")
    loaded = load_tokenizer(tokenizer, eos_token)
    # The output may be inside an input: never read what builds write as text.
    written = (output, state_folder(output))
    files, not_read = find_files(inputs, suffixes=suffixes, format=format, exclude=exclude, ignore=written)
    if progress and not_read.kinds:
        tqdm.write(f"Not read: {not_read}", file=sys.stderr)
    total_bytes = sum(file.bytes for file in files)
    buckets = min(max(1, total_bytes // bucket_bytes), _MAX_BUCKETS)
    # Without on_bad_row: a build that stopped at such a row can resume by skipping it. The keys are on disk.
    identity = {
        "state": _STATE_VERSION,
        "tokenizer": loaded.fingerprint,
        "eos_token": loaded.eos_id,
        "format": format,
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
    journal = Journal(output, identity)
    task = SpoolTask(
        spool=journal.spool,
        run_id=secrets.token_hex(4),
        tokenizer=loaded.spec,
        fingerprint=loaded.fingerprint,
        eos_token=eos_token,
        dtype=token_dtype(loaded.vocab_size),
        text_field=text_field,
        skip_bad_rows=on_bad_row == "skip",
        hold_out=hold_out,
        seed=seed,
        buckets=buckets,
        batch_chars=batch_chars,
    )
    # A row holds the inputs and the targets of one sequence, which overlap in all but one token.
    row_tokens = sequence_length and sequence_length + 1
    layout = ShardLayout(task.dtype, bundle_tokens, loaded.eos_id, seed, pack, row_tokens)
    splits = (TRAIN, VALIDATION) if hold_out else (TRAIN,)
    with journal, worker_pool(workers) as pool_map:
        # After entering the journal, which may put an earlier output back in place.
        _check_output(output, overwrite)
        _check_state(journal, task.skip_bad_rows, progress)
        if not journal.complete:
            _spool(journal, task, files, max_bad_rows, pool_map, progress)
            # At the end, since bad rows come in clusters; the spooled text is kept for a build with a higher limit.
            _skipped_rows(journal.chunks.values()).check(max_bad_rows)
            for split in splits:
                _write_split(journal, split, layout, shard_tokens, loaded, pool_map, progress)
            journal.mark_complete()
        report = _report(journal, output, splits, not_read)
        journal.publish()
    return report


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise DataError(f"{name} is {value}, but must be at least 1")


def _check_choices(
    hold_out: float,
    pack: str | None,
    sequence_length: int | None,
    format: str | None,
    on_bad_row: str,
    max_bad_rows: float,
) -> None:
    if not 0 <= hold_out < 1:
        raise DataError(f"hold_out is {hold_out}, but must be at least 0 and below 1")
    check_policy(on_bad_row, max_bad_rows)
    for name, value, choices in (
        ("pack", pack, (None, *PACKINGS)),
        ("format", format, (None, *FORMATS)),
    ):
        if value not in choices:
            raise DataError(f"{name} is {value!r}, but must be {' or '.join(filter(None, choices))}")
    if pack is not None and (sequence_length is None or sequence_length < 1):
        raise DataError(
            f"--pack {pack} needs --sequence-length, the data.sequence_length of the runs that will read the rows: at "
            f"least 1, not {sequence_length}"
        )
    if pack is None and sequence_length is not None:
        raise DataError(f"--sequence-length {sequence_length} is the length of rows, so it needs --pack best-fit")


def _fingerprint(files: Sequence[SourceFile]) -> str:
    """SHA-256 over paths, names, sizes and modification times, in the order of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([os.path.abspath(file.path), file.name, file.bytes, file.mtime_ns]).encode())
    return digest.hexdigest()


def _check_state(journal: Journal, skip_bad_rows: bool, progress: bool) -> None:
    """Report interrupted builds; refuse to resume one that has left out rows which must not be left out now."""
    skipped = _skipped_rows(journal.chunks.values())
    if skipped.by_reason and not skip_bad_rows:
        raise DataError(
            f"{journal.folder}: holds this build, interrupted, and rows were left out of it with --on-bad-row skip: "
            f"{skipped}; pass --on-bad-row skip again, or remove the folder to start over"
        )
    if progress and journal.started:
        shards = sum(map(len, journal.shards.values()))
        message = (
            f"Resuming the interrupted build: {len(journal.chunks):,} chunks of text and {shards:,} shards are done."
        )
        tqdm.write(message, file=sys.stderr)
    for other in journal.other_builds() if progress else ():
        message = (
            "Starting a new build: there is an interrupted build with other arguments or inputs. "
            "It is kept until this build is complete."
        )
        tqdm.write(f"{message}\n  {other}", file=sys.stderr)


def _spool(
    journal: Journal,
    task: SpoolTask,
    files: Sequence[SourceFile],
    max_bad_rows: float,
    pool_map: PoolMap,
    progress: bool,
) -> None:
    """Run the first pass: tokenize the chunks that the journal does not have yet into spool files."""
    done = journal.chunks
    if journal.all_spooled:
        return
    skipped = _skipped_rows(done.values())
    skipped.check_start(max_bad_rows)
    total, initial = sum(file.bytes for file in files), sum(chunk.bytes for chunk in done.values())
    # Lazily: a chunk of JSONL holds its lines, so only a few chunks may exist at a time.
    numbered = enumerate(split_into_chunks(files, text_field=task.text_field))
    missing = ((number, chunk) for number, chunk in numbered if number not in done)
    with tqdm(desc="tokenize", total=total, initial=initial, unit="B", unit_scale=True, disable=not progress) as bar:
        for chunk in pool_map(partial(spool_chunk, task), missing):
            journal.add_chunk(chunk)
            bar.update(chunk.bytes)
            _add_chunk(skipped, chunk)
            skipped.check_start(max_bad_rows)
    journal.mark_all_spooled()


def _write_split(
    journal: Journal,
    split: str,
    layout: ShardLayout,
    shard_tokens: int,
    tokenizer: Tokenizer,
    pool_map: PoolMap,
    progress: bool,
) -> None:
    """Run the second pass over a split: write the shards that the journal does not have yet, then the manifest."""
    folder, done = journal.result / split, journal.shards[split]
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*"):  # temporary files of write_atomically in a killed process
        unfinished.unlink()
    plans = plan_shards(journal.spool, split, shard_tokens, journal.chunks.values())
    missing = (plan for plan in plans if plan.name not in done)
    total = sum(chunk.documents[split] for chunk in journal.chunks.values())
    initial = sum(shard.documents for shard in done.values())
    with tqdm(desc=f"write {split}", total=total, initial=initial, unit=" documents", disable=not progress) as bar:
        for shard in pool_map(partial(write_planned_shard, folder, layout), missing):
            journal.add_shard(split, shard)
            bar.update(shard.documents)
    if not done:
        if not any(sum(chunk.documents.values()) for chunk in journal.chunks.values()):
            skipped = _skipped_rows(journal.chunks.values())
            reasons = f"; {skipped}" if skipped.by_reason else ""
            raise DataError(
                f"the inputs hold no text: all their documents are empty or left out{reasons}; give other inputs"
            )
        raise DataError(
            f"the inputs have no document for {split}: the split of a document follows from its name alone; "
            f"give more text, or another --hold-out"
        )
    largest = max(shard.max_token_id for shard in done.values())
    shards = tuple(shard.info for shard in done.values())
    bad_rows = sum((Counter(chunk.bad_rows[split]) for chunk in journal.chunks.values()), Counter())
    manifest = Manifest(
        layout.dtype,
        tokenizer.save(folder),
        largest,
        shards,
        row_tokens=layout.row_tokens,
        skipped_rows=dict(sorted(bad_rows.items())) or None,
    )
    write_manifest(folder, manifest)


def _skipped_rows(chunks: Iterable[SpooledChunk]) -> SkippedRows:
    skipped = SkippedRows()
    for chunk in chunks:
        _add_chunk(skipped, chunk)
    return skipped


def _add_chunk(skipped: SkippedRows, chunk: SpooledChunk) -> None:
    good = sum(chunk.documents.values()) + chunk.empty
    skipped.add(good, sum(map(Counter, chunk.bad_rows.values()), Counter()), chunk.first_bad_row)


def _report(journal: Journal, output: Path, splits: Sequence[str], not_read: NotRead) -> BuildReport:
    reports = {}
    for split in splits:
        shards = journal.shards[split].values()
        reports[output / split] = SplitReport(
            manifest=read_manifest(journal.result / split),
            documents=sum(shard.documents for shard in shards),
            cut_documents=sum(shard.cut_documents for shard in shards),
            padding_tokens=sum(shard.padding_tokens for shard in shards),
        )
    chunks = journal.chunks.values()
    return BuildReport(reports, sum(chunk.empty for chunk in chunks), _skipped_rows(chunks), not_read)


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way; only folders that build_shards wrote are ever overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{output}: already exists; give another output, or --overwrite to replace earlier shards")
    if not output.is_dir() or any(
        child.name not in (TRAIN, VALIDATION) or not (child / MANIFEST_NAME).is_file() for child in output.iterdir()
    ):
        raise DataError(f"{output}: holds more than shards, so it is not overwritten; give another output")
