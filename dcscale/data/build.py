"""From text to folders of shards: the whole way, in parallel, into a folder that appears when it is complete."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dcscale.data.corpus import DEFAULT_SUFFIXES, find_files, split
from dcscale.data.errors import DataError
from dcscale.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, write_manifest
from dcscale.data.scatter import TRAIN, VALIDATION, SpoolTask, plan_shards, spool_chunk, write_planned_shard
from dcscale.data.tokenizers import load_tokenizer
from dcscale.files import sync_folder

_BUCKET_BYTES = 1 << 28
_MOST_BUCKETS = 512


@dataclass(frozen=True)
class BuildReport:
    """What became of the text."""

    manifests: dict[Path, Manifest]
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
    seed: int = 0,
    workers: int = 1,
    skip_undecodable: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    bucket_bytes: int = _BUCKET_BYTES,
) -> BuildReport:
    """Tokenise ``inputs`` into ``output/train`` and, for held-out documents, ``output/validation``.

    The result is the same byte for byte for any ``workers`` and ``bucket_bytes``.

    Args:
        inputs: text files (a document each), JSONL files (a document a line), folders of both.
        output: folder to be made; it appears when everything in it is complete.
        tokenizer: ``byte``, or the path of a Hugging Face ``tokenizer.json``.
        eos_token: its token that ends a document, see :func:`dcscale.data.tokenizers.load_tokenizer`.
        suffixes: files of folders to take, see :func:`dcscale.data.corpus.find_files`.
        exclude: patterns of names to leave out, see there.
        text_field: field of a JSONL object that holds the text.
        hold_out: part of the documents that is held out, in [0, 1), chosen by their names alone.
        shard_tokens: tokens of a shard, at least, but for the last.
        bundle_tokens: tokens of a sample, at least, but for a shard's last.
        seed: seed of the documents' order over the shards.
        workers: processes.
        skip_undecodable: leave out documents that are not UTF-8 instead of stopping.
        overwrite: replace ``output`` if it holds shards from an earlier call.
        progress: show progress bars.
        bucket_bytes: bytes of input for each bucket of the shuffle, see :mod:`dcscale.data.scatter`.

    Raises:
        DataError: bad arguments, unreadable input, text without documents for train or validation, or an ``output``
            that is in the way. Nothing half-made is left behind.
    """
    for name, value in {"shard_tokens": shard_tokens, "bundle_tokens": bundle_tokens, "workers": workers}.items():
        if value < 1:
            raise DataError(f"{name} is {value}, but must be at least 1")
    if not 0 <= hold_out < 1:
        raise DataError(f"hold_out is {hold_out}, but must be at least 0 and below 1")
    output = Path(os.path.abspath(output))
    _check_output(output, overwrite)
    loaded = load_tokenizer(tokenizer, eos_token)
    files = find_files(inputs, suffixes=suffixes, exclude=exclude)
    total_bytes = sum(file.bytes for file in files)

    building = output.with_name(f".{output.name}.building-{secrets.token_hex(4)}")
    try:
        (building / "spool").mkdir(parents=True)
        task = SpoolTask(
            spool=building / "spool",
            tokenizer=loaded.spec,
            fingerprint=loaded.fingerprint,
            eos_token=eos_token,
            dtype="uint16" if loaded.vocab_size <= 1 << 16 else "uint32",
            text_field=text_field,
            skip_undecodable=skip_undecodable,
            hold_out=hold_out,
            seed=seed,
            buckets=min(max(1, total_bytes // bucket_bytes), _MOST_BUCKETS),
        )
        empty, undecodable = 0, []
        manifests = {}
        with _processes(workers) as run:
            with tqdm(desc="tokenize", total=total_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
                for count in run(partial(spool_chunk, task), split(files, text_field=text_field)):
                    bar.update(count.bytes)
                    empty += count.empty
                    undecodable += count.undecodable
            for part in (TRAIN, VALIDATION) if hold_out else (TRAIN,):
                folder = building / part
                folder.mkdir()
                write = partial(write_planned_shard, folder, task.dtype, bundle_tokens)
                written = run(write, plan_shards(task.spool, part, shard_tokens))
                shards, largest = _collect(written, part, hold_out, progress)
                manifests[output / part] = Manifest(task.dtype, loaded.save(folder), largest, shards)
                write_manifest(folder, manifests[output / part])
        shutil.rmtree(task.spool)
        _publish(building, output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return BuildReport(manifests, empty, tuple(sorted(undecodable)))


def _collect(
    written: Iterator[tuple[ShardInfo, int]], part: str, hold_out: float, progress: bool
) -> tuple[tuple[ShardInfo, ...], int]:
    """(shards, their largest token id) of a part, as they are written."""
    shards, largest = [], 0
    with tqdm(desc=f"write {part}", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for shard, shard_largest in written:
            shards.append(shard)
            largest = max(largest, shard_largest)
            bar.update(shard.tokens)
    if not shards:
        raise DataError(
            f"the inputs give no document for {part}: of the documents that are not empty, a part of "
            f"{hold_out} is held out; give more text, or another --hold-out"
        )
    return tuple(shards), largest


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


def _publish(building: Path, output: Path) -> None:
    """Put the finished folder in its place; an earlier one is put aside first, and removed last or put back."""
    old = building.with_name(building.name + "-replaced")
    if output.exists():
        output.rename(old)
    try:
        building.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _processes(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map(function, tasks)`` over worker processes, or in this process for ``workers == 1``.

    It gives the results in the order of the tasks, which it takes only a little ahead of the workers.
    """
    if workers == 1:
        yield map
        return
    # Not fork, since the caller may have threads; the server imports the package once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def run(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        running = deque(executor.submit(function, task) for task in islice(tasks, 2 * workers))
        while running:
            yield running.popleft().result()
            running.extend(executor.submit(function, task) for task in islice(tasks, 1))

    try:
        yield run
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which shuts the pool down
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
