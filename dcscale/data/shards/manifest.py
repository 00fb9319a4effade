"""The format of shards, and their manifest: what they hold, so that every sequence is placed without reading a shard.

A folder of shards, version 1
    NAME.tar ...      the shards, in the folder or below
    tokenizer.json    the Hugging Face tokenizer that made the tokens; not for bytes
    manifest.json     all of what is below, written last

A shard is a plain tar (USTAR; PAX and GNU names are read too) that ends with the two blocks of zeros of every tar. Its
members are called KEY.KIND as in WebDataset: KEY may lie in folders, has no dot in its last part and is unique in the
shard, and the members of a key lie side by side. A key is a sample, a bundle of one or more documents:
    KEY.tokens.npy    the tokens of its documents, one after another
    KEY.lens.npy      uint32: the tokens of each document, at least 1; their sum is the length of KEY.tokens.npy
Both are NumPy arrays of format version 1.0, little-endian, with one axis, and never pickled. Tokens are uint16, or
uint32 for vocabularies above 65,536, the same in all shards. Where there is no KEY.lens.npy, the sample is one
document; its tokens may then also be called KEY.npy. All other members, such as KEY.json with metadata, are not read.

A document ends with the tokenizer's end-of-document token, which is in KEY.tokens.npy and counts. Bytes as tokens are
0 to 255, UTF-8, and 256 as that token.

Documents should be scattered over the shards, for training shuffles a few shards at a time, and a shard should hold
1 million to 100 million tokens: it is read as a whole. tools/make_shards.py makes bundles of about 65,536 tokens, keys
SHARD-00000 and so on, all times in the tar 0, and no metadata, so that the same text gives the same bytes.

Rows: with ``row_tokens`` in the manifest, the tokens of a shard are rows of so many tokens, a sequence each; no
document lies across the end of a row. What a row has left is filled with documents of one end-of-document token. A
document that was cut goes on in another row, which begins with the last token of the part before.

Text: with ``text`` in the manifest, samples hold text instead of tokens, see :mod:`dcscale.data.shards.text`.

``manifest.json`` is an object of ``format`` ("dcscale-token-shards"), ``version`` (1), the fields of :class:`Manifest`
and ``totals``, the sums over the shards. It is read strictly: whatever does not follow the rules stated on the fields
below is refused with the file, the field, its value, the rule and the way out. ``tools/inspect_shards.py`` verifies
shards against it, and writes it for tars of this form that have none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.storage import LocalStorage, Storage, UnionStorage, UnreadableError, open_storage
from dcscale.files import write_json

MANIFEST_NAME = "manifest.json"
FORMAT = "dcscale-token-shards"
VERSION = 1
DTYPES = ("uint16", "uint32")
_TOTALS = ("bytes", "samples", "documents", "tokens", "text_bytes")

_SHA256 = (r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")
SHARD_NAME = (
    r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*\.tar",
    "a relative path inside the folder, ending in .tar, of letters, digits and ._- , no part starting with a dot",
)


def _at_least(minimum: int) -> Any:
    return field(metadata={"minimum": minimum})


def _like(pattern: str, rule: str) -> Any:
    return field(metadata={"pattern": pattern, "rule": rule})


@dataclass(frozen=True)
class ShardInfo:
    """One shard."""

    name: str = _like(*SHARD_NAME)
    """Path of the tar, relative to the manifest."""

    bytes: int = _at_least(1)
    """Size of the tar."""

    sha256: str = _like(*_SHA256)
    """Checksum of the whole tar."""

    samples: int = _at_least(1)
    """Bundles in it; for text, samples that give a document."""

    documents: int = _at_least(1)
    """Documents in it."""

    tokens: int = _at_least(1)
    """Tokens in it, end-of-document tokens included."""

    text_bytes: int = _at_least(0)
    """UTF-8 bytes of the documents' text; 0 where the text is not known."""


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the tokens."""

    spec: str = _like(r"byte|tokenizer\.json", "'byte', or 'tokenizer.json' for the file beside the manifest")
    """``byte``, or ``tokenizer.json``: the Hugging Face tokenizer that lies beside the manifest."""

    fingerprint: str = _like(*_SHA256)
    """SHA-256 of the ``tokenizer.json``; for ``byte`` of the ASCII text ``dcscale byte tokenizer, version 1``."""

    vocab_size: int = _at_least(1)
    """One more than the largest token id that the tokenizer can give."""

    eos_id: int = _at_least(0)
    """The token that ends every document."""


@dataclass(frozen=True)
class TextInfo:
    """Where the text lies in tars that hold text instead of tokens."""

    member: str = _like(r"txt|json", "'txt' or 'json'")
    """``txt`` for the member ``KEY.txt``, ``json`` for a field of the object in ``KEY.json``."""

    field: str = _like(r"(?s).*", "a string, empty for txt")
    """Field of the object that holds the text; empty for ``txt``."""


@dataclass(frozen=True)
class Manifest:
    """All that is known about a folder of shards."""

    dtype: str
    """Type of the tokens: ``uint16``, or ``uint32`` for vocabularies above 65,536."""

    tokenizer: TokenizerInfo
    """What made the tokens."""

    max_token_id: int
    """Largest token id in the shards."""

    shards: tuple[ShardInfo, ...]
    """The shards, in the order that unshuffled reading follows."""

    row_tokens: int | None = None
    """Tokens of a row, where the shards are made of rows: each is read as one sequence, of one target less. Its slack
    is filled with documents of one end-of-document token, which have no target. Left out of the file where null."""

    text: TextInfo | None = None
    """Where the text lies, if the shards hold text, to be tokenised whenever they are read; see
    :mod:`dcscale.data.shards.text`. Left out of the file where null."""

    @cached_property
    def totals(self) -> dict[str, int]:
        """Sums over the shards: ``bytes``, ``samples``, ``documents``, ``tokens``, ``text_bytes``."""
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in _TOTALS}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which tokens are read: it changes with the data, not with file names."""
        content = {
            "dtype": self.dtype,
            "tokenizer": [self.tokenizer.fingerprint, self.tokenizer.vocab_size, self.tokenizer.eos_id],
            "shards": [[shard.sha256, shard.documents, shard.tokens] for shard in self.shards],
            **self._optional,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def _optional(self) -> dict[str, Any]:
        values = {"row_tokens": self.row_tokens, "text": self.text and asdict(self.text)}
        return {name: value for name, value in values.items() if value is not None}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically; it must come after the shards that it names."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": manifest.dtype,
        "tokenizer": asdict(manifest.tokenizer),
        "max_token_id": manifest.max_token_id,
        **manifest._optional,
        "totals": manifest.totals,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_json(folder / MANIFEST_NAME, content)


def read_manifest(root: str | Path | Storage) -> Manifest:
    """Read the ``manifest.json`` of a root of shards; of several roots that are read as one, all of them.

    Raises:
        DataError: the root or the manifest is missing, unreadable, of another version, or breaks a rule; or the roots
            hold tokens of different kinds.
    """
    source = open_storage(root)
    if isinstance(source, UnionStorage):
        return _join(source, [read_manifest(part) for part in source.parts])
    path = source.where(MANIFEST_NAME)
    try:
        text = source.read(MANIFEST_NAME)
    except UnreadableError as error:
        if not error.missing:
            raise DataError(f"{error}; it must be a readable file") from error
        hint = "make the shards with tools/make_shards.py"
        if isinstance(source, LocalStorage):
            inside = [child.name for child in sorted(source.folder.iterdir()) if (child / MANIFEST_NAME).is_file()]
            hint = f"did you mean {source.folder / inside[0]}?" if inside else hint
        raise DataError(f"{path}: no such file, so {source} is not a folder of shards; {hint}") from error
    return _Reader(path).manifest(text)


def _join(source: UnionStorage, manifests: Sequence[Manifest]) -> Manifest:
    first = manifests[0]
    for part, manifest in zip(source.parts, manifests):
        for name in ("dtype", "tokenizer", "row_tokens", "text"):
            found, wanted = getattr(manifest, name), getattr(first, name)
            if found != wanted:
                raise DataError(
                    f"{part.where(MANIFEST_NAME)}: {name} is {found}, but in {source.parts[0].where(MANIFEST_NAME)} it "
                    f"is {wanted}; read as one must be the same kind of tokens: make the shards of one again"
                )
    shards = [
        replace(shard, name=f"{number}/{shard.name}")
        for number, manifest in enumerate(manifests)
        for shard in manifest.shards
    ]
    return replace(first, max_token_id=max(manifest.max_token_id for manifest in manifests), shards=tuple(shards))


@cache
def _rules(kind: type) -> tuple[set[str], list[tuple[str, int | None, Any, str]]]:
    """(names of a record's fields, each with its minimum, or else what tells whether a text is right and the rule)."""
    rules = []
    for item in fields(kind):
        rule = item.metadata
        matches = re.compile(rule["pattern"]).fullmatch if "pattern" in rule else None
        rules.append((item.name, rule.get("minimum"), matches, rule.get("rule", "")))
    return {item.name for item in fields(kind)}, rules


class _Reader:
    """Strict reading of one manifest: every method returns a value that keeps the rules, or raises."""

    def __init__(self, path: str) -> None:
        self.path = path

    def fail(self, name: str, value: object, rule: str, fix: str = "") -> NoReturn:
        fix = (
            fix or "the file is damaged or was edited: copy the folder again or make it anew with tools/make_shards.py"
        )
        shown = repr(value) if len(repr(value)) <= 100 else repr(value)[:100] + "..."
        raise DataError(f"{self.path}: {name} is {shown}, but must be {rule}; {fix}")

    def manifest(self, text: bytes) -> Manifest:
        try:
            content = json.loads(text)
        except ValueError as error:
            self.fail("the content", text[:60], f"a JSON object ({error})")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            value = content.get("format") if isinstance(content, dict) else content
            self.fail("format", value, repr(FORMAT), "give a folder that tools/make_shards.py wrote")
        if content.get("version") != VERSION:
            fix = "make the shards again with this version's tools/make_shards.py, or use the version that wrote them"
            self.fail("version", content.get("version"), f"{VERSION}, the version that this code reads", fix)
        known = {"format", "version", "dtype", "tokenizer", "max_token_id", "totals", "shards"}
        self.keys("the manifest", content, known | ({"row_tokens", "text"} & set(content)))

        dtype, tokenizer = content["dtype"], self.record(TokenizerInfo, "tokenizer", content["tokenizer"])
        if dtype not in DTYPES:
            self.fail("dtype", dtype, " or ".join(DTYPES))
        if tokenizer.eos_id >= tokenizer.vocab_size:
            self.fail("tokenizer.eos_id", tokenizer.eos_id, f"below tokenizer.vocab_size, {tokenizer.vocab_size}")
        largest = min(tokenizer.vocab_size - 1, int(np.iinfo(dtype).max))
        if type(content["max_token_id"]) is not int or not 0 <= content["max_token_id"] <= largest:
            self.fail(
                "max_token_id", content["max_token_id"], f"a whole number from 0 to {largest} (vocabulary, dtype)"
            )

        if not isinstance(content["shards"], list) or not content["shards"]:
            self.fail("shards", content["shards"], "a list of at least one shard")
        shards = tuple(self.shard(f"shards[{i}]", shard) for i, shard in enumerate(content["shards"]))
        names: dict[str, int] = {}
        for i, shard in enumerate(shards):
            if shard.name in names:
                self.fail(f"shards[{i}].name", shard.name, f"unique, but shards[{names[shard.name]}] has it too")
            names[shard.name] = i

        row_tokens = content.get("row_tokens")
        if "row_tokens" in content and (type(row_tokens) is not int or row_tokens < 2):
            self.fail("row_tokens", row_tokens, "a whole number, at least 2, or left out")
        for i, shard in enumerate(shards):
            if row_tokens and shard.tokens % row_tokens:
                self.fail(f"shards[{i}].tokens", shard.tokens, f"a multiple of row_tokens, {row_tokens}")

        text = self.record(TextInfo, "text", content["text"]) if "text" in content else None
        if text is not None and (row_tokens is not None or (text.member == "json") != bool(text.field)):
            rule = "with a field for json and an empty one for txt, and cannot be where there is row_tokens"
            self.fail("text", content["text"], rule)

        manifest = Manifest(dtype, tokenizer, content["max_token_id"], shards, row_tokens, text)
        self.keys("totals", content["totals"], set(_TOTALS))
        for name in _TOTALS:
            if content["totals"][name] != manifest.totals[name]:
                self.fail(
                    f"totals.{name}", content["totals"][name], f"the sum over the shards, {manifest.totals[name]}"
                )
        return manifest

    def shard(self, where: str, value: Any) -> ShardInfo:
        shard = self.record(ShardInfo, where, value)
        if not shard.samples <= shard.documents <= shard.tokens:
            counts = {"samples": shard.samples, "documents": shard.documents, "tokens": shard.tokens}
            self.fail(where, counts, "such that samples <= documents <= tokens")
        return shard

    def record(self, kind: type, where: str, value: Any) -> Any:
        """``value`` as a ``kind``, each field checked against the rule in its metadata."""
        names, rules = _rules(kind)
        self.keys(where, value, names)
        for name, minimum, matches, rule in rules:
            entry = value[name]
            if minimum is not None:
                if type(entry) is not int or entry < minimum:
                    self.fail(f"{where}.{name}", entry, f"a whole number, at least {minimum}")
            elif not isinstance(entry, str) or not matches(entry):
                self.fail(f"{where}.{name}", entry, rule)
        return kind(**value)

    def keys(self, where: str, value: Any, known: set[str]) -> None:
        if not isinstance(value, dict):
            self.fail(where, value, f"an object with {', '.join(sorted(known))}")
        if value.keys() != known:
            missing, unknown = sorted(known - set(value)), sorted(set(value) - known)
            self.fail(f"the fields of {where}", {"missing": missing, "unknown": unknown}, "exactly those of the format")
