"""The format of shards and of their manifest, which records enough to place every sequence without reading a shard.

A folder of shards, version 1
    NAME.tar ...      the shards, in the folder or in subfolders
    tokenizer.json    the Hugging Face tokenizer that made the tokens; absent for byte tokens
    manifest.json     everything described below; written last

A shard is a plain tar (USTAR; PAX and GNU names are read too) that ends with the usual two blocks of zeros. Its members
are named KEY.EXT as in WebDataset. KEY may contain folders, has no dot after its last slash and is unique in the shard;
members with the same key are adjacent. The members of a key form a sample, a bundle of one or more documents:
    KEY.tokens.npy    the tokens of its documents, one after another
    KEY.lens.npy      uint32: number of tokens of each document, at least 1; their sum is the length of KEY.tokens.npy
Both are NumPy arrays of format version 1.0, little-endian, one-dimensional, and never pickled. Tokens are uint16, or
uint32 for vocabularies above 65,536, the same type in all shards. Without KEY.lens.npy, the sample is one document; its
tokens may then also be named KEY.npy. All other members, such as KEY.json with metadata, are ignored.

A document ends with the tokenizer's end-of-document token, which is stored in KEY.tokens.npy and counted. Byte tokens
are the UTF-8 bytes 0 to 255, and 256 is their end-of-document token.

Distribute documents randomly over the shards, because training shuffles only a few shards at a time. A shard should
hold 1 million to 100 million tokens, because it is read into memory at once. tools/make_shards.py makes bundles of
about 65,536 tokens with keys SHARD-00000 and so on, tar times of 0 and no metadata, so that the same text gives the
same bytes.

Rows: with ``row_tokens`` in the manifest, a shard is a sequence of rows of ``row_tokens`` tokens; each row is one
training sequence and no document crosses the end of a row. Documents of one end-of-document token pad a row. A document
that was cut continues in another row, which begins with the last token of the previous part.

Text: with ``text`` in the manifest, samples hold text instead of tokens; see :mod:`dcscale.data.shards.text`.

``manifest.json`` is an object with ``format`` ("dcscale-token-shards"), ``version`` (1), the fields of
:class:`Manifest` and ``totals``, the sums over the shards. It is validated strictly: a value that breaks a rule stated
at the fields below is refused with the file, the field, the value, the rule and the fix. ``tools/inspect_shards.py``
verifies shards against their manifest, and writes one for tars of this format that have none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.storage import LocalStorage, Storage, UnionStorage, UnreadableError, open_storage
from dcscale.files import parse_json, write_json

MANIFEST_NAME = "manifest.json"
FORMAT = "dcscale-token-shards"
VERSION = 1
DTYPES = ("uint16", "uint32")
_TOTALS = ("bytes", "samples", "documents", "tokens", "text_bytes")

# (pattern, the same rule for error messages)
_SHA256 = (r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")
SHARD_NAME = (
    r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*\.tar",
    "a relative path inside the folder, ending in .tar, of letters, digits and ._- , no part starting with a dot",
)


# The rule of a field is stored in its metadata, where _ManifestParser.record finds it.
def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds every token id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _at_least(minimum: int) -> Any:
    return field(metadata={"minimum": minimum})


def _matching(pattern: str, rule: str) -> Any:
    return field(metadata={"pattern": pattern, "rule": rule})


@dataclass(frozen=True)
class ShardInfo:
    """The entry of one shard."""

    name: str = _matching(*SHARD_NAME)
    """Path of the tar, relative to the manifest."""

    bytes: int = _at_least(1)
    """Size of the tar file."""

    sha256: str = _matching(*_SHA256)
    """Checksum of the tar file."""

    samples: int = _at_least(1)
    """Number of bundles; for text, of samples that give a document."""

    documents: int = _at_least(1)
    """Number of documents."""

    tokens: int = _at_least(1)
    """Number of tokens, end-of-document tokens included."""

    text_bytes: int = _at_least(0)
    """UTF-8 bytes of the documents' text; 0 if unknown."""


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the tokens."""

    spec: str = _matching(r"byte|tokenizer\.json", "'byte', or 'tokenizer.json' for the file next to the manifest")
    """``byte``, or ``tokenizer.json``: the Hugging Face tokenizer next to the manifest."""

    fingerprint: str = _matching(*_SHA256)
    """SHA-256 of the ``tokenizer.json``; for ``byte`` of the ASCII text ``dcscale byte tokenizer, version 1``."""

    vocab_size: int = _at_least(1)
    """One more than the largest token id that the tokenizer can produce."""

    eos_id: int = _at_least(0)
    """The token that ends every document."""


@dataclass(frozen=True)
class TextInfo:
    """Which part of a sample holds the text, in tars of text instead of tokens."""

    member: str = _matching(r"txt|json", "'txt' or 'json'")
    """``txt`` for the member ``KEY.txt``, ``json`` for a field of the object in ``KEY.json``."""

    field: str = _matching(r"(?s).*", "a string, empty for txt")
    """Field of the object that holds the text; empty for ``txt``."""


@dataclass(frozen=True)
class Manifest:
    """Everything that is recorded about a folder of shards."""

    dtype: str
    """Type of the tokens: ``uint16``, or ``uint32`` for vocabularies above 65,536."""

    tokenizer: TokenizerInfo
    """The tokenizer that made the tokens."""

    max_token_id: int
    """Largest token id in the shards."""

    shards: tuple[ShardInfo, ...]
    """The shards, in the order of unshuffled reading."""

    row_tokens: int | None = None
    """Tokens of a row, if the shards are made of rows. A row is read as one sequence of ``row_tokens - 1`` targets,
    padded with documents of one end-of-document token, which have no target. Omitted from the file if None."""

    text: TextInfo | None = None
    """Where the text is, if the shards hold text, which is tokenized at each read; see
    :mod:`dcscale.data.shards.text`. Omitted from the file if None."""

    skipped_rows: dict[str, int] | None = field(default=None, hash=False)  # a dict cannot be hashed
    """Reason -> rows of the input that were left out because they cannot be used, see :mod:`dcscale.data.bad_rows`.
    Omitted from the file if None."""

    @cached_property
    def totals(self) -> dict[str, int]:
        """Sums over the shards: ``bytes``, ``samples``, ``documents``, ``tokens``, ``text_bytes``."""
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in _TOTALS}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines which tokens are read; independent of file names."""
        content = {
            "dtype": self.dtype,
            "tokenizer": [self.tokenizer.fingerprint, self.tokenizer.vocab_size, self.tokenizer.eos_id],
            "shards": [[shard.sha256, shard.documents, shard.tokens] for shard in self.shards],
            # Absent keys keep the fingerprints of manifests that lack them; skipped rows are not read.
            **{name: value for name, value in self._optional.items() if name != "skipped_rows"},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def _optional(self) -> dict[str, Any]:
        """The optional keys of the file that have a value."""
        values = {
            "row_tokens": self.row_tokens,
            "text": self.text and asdict(self.text),
            "skipped_rows": self.skipped_rows,
        }
        return {name: value for name, value in values.items() if value is not None}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically; call it after all shards have been written."""
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
    """Read the ``manifest.json`` of a root of shards; if several roots are read as one, join their manifests.

    Args:
        root: see :func:`dcscale.data.storage.open_storage`.

    Raises:
        DataError: the root or the manifest is missing, unreadable, of another version, or breaks a rule; or the roots
            hold tokens of different kinds.
    """
    storage = open_storage(root)
    if isinstance(storage, UnionStorage):
        return _join(storage, [read_manifest(part) for part in storage.parts])
    path = storage.location(MANIFEST_NAME)
    try:
        text = storage.read(MANIFEST_NAME)
    except UnreadableError as error:
        if not error.missing:
            raise DataError(f"{error}; it must be a readable file") from error
        hint = "make the shards with tools/make_shards.py"
        if isinstance(storage, LocalStorage):  # the user may have named the folder above train/ or validation/
            inside = [child.name for child in sorted(storage.folder.iterdir()) if (child / MANIFEST_NAME).is_file()]
            hint = f"did you mean {storage.folder / inside[0]}?" if inside else hint
        raise DataError(f"{path}: no such file, so {storage} is not a folder of shards; {hint}") from error
    return _ManifestParser(path).parse(text)


def _join(storage: UnionStorage, manifests: Sequence[Manifest]) -> Manifest:
    first = manifests[0]
    for part, manifest in zip(storage.parts, manifests):
        for name in ("dtype", "tokenizer", "row_tokens", "text"):
            found, wanted = getattr(manifest, name), getattr(first, name)
            if found != wanted:
                raise DataError(
                    f"{part.location(MANIFEST_NAME)}: {name} is {found}, but in "
                    f"{storage.parts[0].location(MANIFEST_NAME)} it is {wanted}; folders that are read as one must "
                    f"hold the same kind of tokens: rebuild the shards of one of them"
                )
    shards = [
        replace(shard, name=f"{number}/{shard.name}")  # the names that UnionStorage expects
        for number, manifest in enumerate(manifests)
        for shard in manifest.shards
    ]
    skipped_rows = sum((Counter(manifest.skipped_rows) for manifest in manifests), Counter())
    return replace(
        first,
        max_token_id=max(manifest.max_token_id for manifest in manifests),
        shards=tuple(shards),
        skipped_rows=dict(sorted(skipped_rows.items())) or None,
    )


@cache
def _field_rules(kind: type) -> tuple[set[str], list[tuple[str, int | None, Any, str]]]:
    """(field names of a dataclass, (name, minimum or None, matcher or None, rule) of each field)."""
    rules = []
    for item in fields(kind):
        rule = item.metadata
        matches = re.compile(rule["pattern"]).fullmatch if "pattern" in rule else None
        rules.append((item.name, rule.get("minimum"), matches, rule.get("rule", "")))
    return {item.name for item in fields(kind)}, rules


class _ManifestParser:
    """Strict parser of one manifest: every method returns a valid value or raises a DataError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def fail(self, name: str, value: object, rule: str, fix: str = "") -> NoReturn:
        fix = fix or (
            "the file is corrupt or was edited: copy the folder again or rebuild it with tools/make_shards.py"
        )
        shown = repr(value) if len(repr(value)) <= 100 else repr(value)[:100] + "..."
        raise DataError(f"{self.path}: {name} is {shown}, but must be {rule}; {fix}")

    def parse(self, text: bytes) -> Manifest:
        content = self._load(text)
        dtype, tokenizer = content["dtype"], self.record(TokenizerInfo, "tokenizer", content["tokenizer"])
        if dtype not in DTYPES:
            self.fail("dtype", dtype, " or ".join(DTYPES))
        if tokenizer.eos_id >= tokenizer.vocab_size:
            self.fail("tokenizer.eos_id", tokenizer.eos_id, f"below tokenizer.vocab_size, {tokenizer.vocab_size}")
        largest = min(tokenizer.vocab_size - 1, int(np.iinfo(dtype).max))
        max_token_id = content["max_token_id"]
        # type(), not isinstance(): True is an int for isinstance.
        if type(max_token_id) is not int or not 0 <= max_token_id <= largest:
            self.fail("max_token_id", max_token_id, f"a whole number from 0 to {largest} (vocabulary, dtype)")

        if not isinstance(content["shards"], list) or not content["shards"]:
            self.fail("shards", content["shards"], "a list of at least one shard")
        shards = tuple(self.shard(f"shards[{i}]", shard) for i, shard in enumerate(content["shards"]))
        index_of_name: dict[str, int] = {}
        for i, shard in enumerate(shards):
            if shard.name in index_of_name:
                rule = f"unique, but shards[{index_of_name[shard.name]}] has it too"
                self.fail(f"shards[{i}].name", shard.name, rule)
            index_of_name[shard.name] = i

        row_tokens = content.get("row_tokens")
        if "row_tokens" in content and (type(row_tokens) is not int or row_tokens < 2):
            self.fail("row_tokens", row_tokens, "a whole number, at least 2, or left out")
        for i, shard in enumerate(shards):
            if row_tokens and shard.tokens % row_tokens:
                self.fail(f"shards[{i}].tokens", shard.tokens, f"a multiple of row_tokens, {row_tokens}")

        text_info = self.record(TextInfo, "text", content["text"]) if "text" in content else None
        if text_info and (row_tokens is not None or (text_info.member == "json") != bool(text_info.field)):
            rule = "member json with the name of a field, or member txt with an empty field, and without row_tokens"
            self.fail("text", content["text"], rule)

        skipped_rows = content.get("skipped_rows")
        counts = skipped_rows.values() if isinstance(skipped_rows, dict) else ()
        if "skipped_rows" in content and (not counts or any(type(count) is not int or count < 1 for count in counts)):
            self.fail("skipped_rows", skipped_rows, "an object of whole numbers, at least 1, or left out")

        manifest = Manifest(dtype, tokenizer, max_token_id, shards, row_tokens, text_info, skipped_rows)
        self.keys("totals", content["totals"], set(_TOTALS))
        for name, total in manifest.totals.items():
            if content["totals"][name] != total:
                self.fail(f"totals.{name}", content["totals"][name], f"the sum over the shards, {total}")
        return manifest

    def _load(self, text: bytes) -> dict[str, Any]:
        """The JSON object, of the right format and version and with the right keys."""
        try:
            content = parse_json(text, self.path)
        except ValueError as error:
            raise DataError(f"{error}; give a folder that tools/make_shards.py wrote") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            value = content.get("format") if isinstance(content, dict) else content
            self.fail("format", value, repr(FORMAT), "give a folder that tools/make_shards.py wrote")
        if content.get("version") != VERSION:
            fix = "make the shards again with this version's tools/make_shards.py, or use the version that wrote them"
            self.fail("version", content.get("version"), f"{VERSION}, the version that this code reads", fix)
        required = {"format", "version", "dtype", "tokenizer", "max_token_id", "totals", "shards"}
        self.keys("the manifest", content, required | ({"row_tokens", "text", "skipped_rows"} & set(content)))
        return content

    def shard(self, name: str, value: Any) -> ShardInfo:
        shard = self.record(ShardInfo, name, value)
        if not shard.samples <= shard.documents <= shard.tokens:
            counts = {"samples": shard.samples, "documents": shard.documents, "tokens": shard.tokens}
            self.fail(name, counts, "such that samples <= documents <= tokens")
        return shard

    def record(self, kind: type, name: str, value: Any) -> Any:
        """``value`` as a dataclass ``kind``, each field checked against the rule in its metadata."""
        known, rules = _field_rules(kind)
        self.keys(name, value, known)
        for item, minimum, matches, rule in rules:
            entry = value[item]
            if minimum is not None:
                if type(entry) is not int or entry < minimum:
                    self.fail(f"{name}.{item}", entry, f"a whole number, at least {minimum}")
            elif not isinstance(entry, str) or not matches(entry):
                self.fail(f"{name}.{item}", entry, rule)
        return kind(**value)

    def keys(self, name: str, value: Any, known: set[str]) -> None:
        """Check that ``value`` is an object with exactly the keys ``known``."""
        if not isinstance(value, dict):
            self.fail(name, value, f"an object with {', '.join(sorted(known))}")
        if value.keys() != known:
            missing, unknown = sorted(known - set(value)), sorted(set(value) - known)
            self.fail(f"the fields of {name}", {"missing": missing, "unknown": unknown}, "exactly those of the format")
