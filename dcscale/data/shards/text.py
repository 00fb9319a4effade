"""Text shards: third-party WebDataset tars whose samples hold text, tokenized each time they are read.

A document is the text of a sample plus the end-of-document token. The text is the member ``KEY.txt``, or one field of
the JSON object in ``KEY.json``, without a byte order mark at the member's beginning. Samples without that member,
samples whose text gives no token, and all other members, such as images, are ignored. Samples whose text cannot be used
are left out if the manifest has ``skipped_rows``, and are an error otherwise. The order of training needs the number of
tokens, so a manifest next to the tars records it; ``tools/inspect_shards.py --write-manifest`` tokenizes everything
once to write one.

A thread tokenizes about 0.3 million tokens a second (measured on a shared CPU core), and every epoch, restart and rank
repeats the work. For a large run, unpack the text and make token shards with ``tools/make_shards.py``. Each read must
give the same tokens, so the version of the tokenizers library must not change either.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dcscale.data.bad_rows import BadRow, decode_text, text_of_json
from dcscale.data.shards.manifest import Manifest, TextInfo
from dcscale.data.shards.tar import member_bytes, raise_shard_error, read_samples
from dcscale.data.storage import Storage
from dcscale.data.tokenizers import Tokenizer, load_shard_tokenizer

_BATCH_CHARACTERS = 1 << 22
"""Texts are tokenized in batches of at least this many characters; bounds the memory for token ids."""


@dataclass(frozen=True)
class TextReader:
    """Tokenizes the texts in a tar."""

    info: TextInfo
    tokenizer: Tokenizer
    dtype: str
    skip_bad_rows: bool
    """Leave out samples whose text cannot be used, see :mod:`dcscale.data.bad_rows`, instead of raising."""

    def samples(self, path: str, data: bytes) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield (key, tokens [n], lengths [1]) of each sample of a tar that gives a document.

        Args:
            path: path or address of the tar, for error messages.
            data: content of the tar.

        Raises:
            DataError: the tar is incomplete or malformed, or a text cannot be read.
        """
        for key, _, tokens in self.documents(path, data):
            yield key, tokens, np.array([len(tokens)], dtype="uint32")

    def documents(
        self, path: str, data: bytes, bad_rows: Counter[str] | None = None
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield (key, text, tokens [n]) of each document of a tar; arguments and errors as in :meth:`samples`.

        Args:
            bad_rows: counts the samples that are left out, by reason.
        """
        batch: list[tuple[str, str]] = []
        size = 0
        for key, text in self._texts(path, data, Counter() if bad_rows is None else bad_rows):
            batch.append((key, text))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield from self._encode(batch)
                batch, size = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[tuple[str, str]]) -> Iterator[tuple[str, str, np.ndarray]]:
        for (key, text), tokens in zip(batch, self.tokenizer.encode_documents([text for _, text in batch])):
            if len(tokens) > 1:  # more than the end-of-document token
                yield key, text, tokens.astype(self.dtype)

    def _texts(self, path: str, data: bytes, bad_rows: Counter[str]) -> Iterator[tuple[str, str]]:
        for sample in read_samples(path, data):
            if member := sample.members.get(self.info.member):
                content = member_bytes(path, data, member)
                if content[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8:
                    content = content[len(codecs.BOM_UTF8) :]
                is_json = self.info.member == "json"
                try:
                    text = text_of_json(content, self.info.field) if is_json else decode_text(content)
                except BadRow as bad:
                    if not self.skip_bad_rows:
                        fix = f"{bad.fix}, or write a manifest that leaves such samples out, with --on-bad-row skip"
                        raise_shard_error(path, f"member {member.name}: {bad.problem}", fix)
                    bad_rows[bad.reason] += 1
                else:
                    yield sample.key, text


def open_text_reader(storage: Storage, manifest: Manifest) -> TextReader | None:
    """The reader of text shards; None if the shards hold tokens.

    Raises:
        DataError: their tokenizer is missing or does not match the manifest.
    """
    if manifest.text is None:
        return None
    tokenizer, skip_bad_rows = load_shard_tokenizer(storage, manifest), manifest.skipped_rows is not None
    return TextReader(manifest.text, tokenizer, manifest.dtype, skip_bad_rows)
