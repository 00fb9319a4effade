"""Rows of JSON files: the lines of JSON lines, or the elements of one array; packed or not."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from json import JSONDecodeError
from pathlib import Path
from typing import IO

from dcscale.data.bad_rows import JSON_DECODER
from dcscale.data.errors import DataError

try:  # optional: in the standard library from Python 3.14 on
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    zstd = None

_READ_ERRORS = (OSError, EOFError, zlib.error, *([zstd.ZstdError] if zstd else []))
_START_BYTES = 1 << 16
"""Bytes by which the layout of a file is recognised."""
_SPACE = re.compile(r"[ \t\n\r]*")


def is_array(path: Path) -> bool:
    """Whether a file holds one array, rather than an object on each line; JSON lines by suffix: one of objects.

    Raises:
        DataError: the file cannot be read or unpacked, or is a ``.json`` that holds neither.
    """
    try:
        with open(path, "rb") as raw, _unpacked(path, raw) as file:
            start = file.read(_START_BYTES)
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {error}; replace the file, or leave it out with --exclude") from error
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if not without_packing(path.name.lower()).endswith(".json"):
        return text[:1] == b"[" and text[1:].lstrip()[:1] == b"{"  # else a bad line, which may be skipped
    line, newline, _ = text.partition(b"\n")
    is_complete = newline or len(start) < _START_BYTES
    if text[:1] == b"{" and is_complete:
        try:
            JSON_DECODER.decode(line.decode(errors="replace"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: must hold an object on each line or one array of objects, but its first line alone is not "
                f"JSON ({error}), as where one object takes several lines; leave the file out with --exclude, write it "
                f"as JSON lines, or read every file as one text with --format text"
            ) from error
    return text[:1] == b"["


def without_packing(name: str) -> str:
    """A name in lower case without the suffix of its compression."""
    return name.removesuffix(".gz").removesuffix(".zst")


def read_batches(path: Path, array: bool, batch_bytes: int) -> Iterator[tuple[list[bytes], int]]:
    """Yield (rows, bytes of the file on disk that were read so far): undecoded lines, or elements of an array.

    Each batch has ``batch_bytes`` bytes or a little more. Only a batch is in memory, and one element.

    Raises:
        DataError: the file cannot be read or unpacked, or the array is malformed or has an element that is too long.
    """
    rows = 0
    try:
        with open(path, "rb") as raw, _unpacked(path, raw) as file:
            for batch in (
                _batches_of_elements(path, file, batch_bytes) if array else _batches_of_lines(file, batch_bytes)
            ):
                yield batch, raw.tell()
                rows += len(batch)
    except _READ_ERRORS as error:
        unit = "element" if array else "line"
        raise DataError(f"{path}: cannot be read after {unit} {rows}: {error}; replace the file") from error


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(raw)
    if name.endswith(".zst"):
        if zstd is None:
            raise DataError(
                f"{path}: reading .zst needs the backports.zstd package, which is not installed; install it with "
                f"'pip install backports.zstd', or give the text as .jsonl.gz"
            )
        # Accept files written with `zstd --long=31`; by default, windows larger than --long=27 are refused.
        return zstd.open(raw, options={zstd.DecompressionParameter.window_log_max: 31})
    return raw


def _batches_of_lines(file: IO[bytes], batch_bytes: int) -> Iterator[list[bytes]]:
    start = codecs.BOM_UTF8
    while lines := file.readlines(batch_bytes):
        lines[0] = lines[0].removeprefix(start)
        start = b""
        yield lines


def _batches_of_elements(path: Path, file: IO[bytes], batch_bytes: int) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for element in array_elements(path, file):
        batch.append(element)
        size += len(element)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def array_elements(
    path: Path, file: IO[bytes], *, read_chars: int = 1 << 20, longest_chars: int = 1 << 26
) -> Iterator[bytes]:
    """Yield the undecoded elements of the array in a file, which may be larger than memory.

    Args:
        path: the file's path, for error messages.
        file: its unpacked content.
        read_chars: characters to read at a time.
        longest_chars: about the longest element that is accepted.

    Raises:
        DataError: the array is malformed, or has a longer element.
    """
    # What is not UTF-8 passes through unchanged, since it spoils only its own row.
    reader = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    text = reader.read(read_chars)
    while text.isspace():
        text = reader.read(read_chars)
    at, number, separator = text.find("[") + 1, 1, ","
    while separator == ",":
        begin = _SPACE.match(text, at).end()
        try:
            if number == 1 and text[begin] == "]":
                at = begin + 1
                break
            end = JSON_DECODER.raw_decode(text, begin)[1]
            after = _SPACE.match(text, end).end()
            separator = text[after]
        except (ValueError, IndexError) as error:
            # Either malformed, or it does not end in what was read so far. Read as much again: the time is linear.
            more = reader.read(max(read_chars, len(text) - begin))
            if not more or len(text) - begin > longest_chars:
                problem = error.msg if isinstance(error, JSONDecodeError) else "the file ends"
                rule = f"must end within {longest_chars:,} characters" if more else f"is not complete JSON: {problem}"
                raise DataError(
                    f"{path}: element {number} of its array {rule}; correct the file, or write it as JSON lines"
                ) from error
            text, at = text[begin:] + more, 0
            continue
        except RecursionError as error:
            raise DataError(f"{path}: element {number} of its array is nested too deeply; correct the file") from error
        if separator not in ",]":
            raise DataError(f"{path}: element {number} of its array is followed by {separator!r}; correct the file")
        yield text[begin:end].encode("utf-8", "surrogateescape")
        at, number = after + 1, number + 1
    for rest in chain([text[at:]], iter(partial(reader.read, read_chars), "")):
        if rest.strip():
            raise DataError(f"{path}: has more after the end of its array; write it as JSON lines, or as one array")
    reader.detach()  # otherwise it would close the file
