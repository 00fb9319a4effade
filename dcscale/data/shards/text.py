"""Text tars of others: WebDataset tars whose samples hold text, tokenised whenever they are read.

A document is the text of a sample and the token that ends it: the member ``KEY.txt``, or one field of the object in
``KEY.json``. Samples without that member, or whose text gives no token, are left out, and so is all else that a sample
holds, such as images. A manifest beside the tars says how many tokens that gives, since the order of training needs
it; ``tools/inspect_shards.py --write-manifest`` writes one by tokenising everything once.

A thread tokenises about 0.3 million tokens a second (measured on a shared CPU core), and every epoch, restart and rank
does it anew: for a large run, unpack the text and make token shards of it with ``tools/make_shards.py``. Each reading
must give the same tokens, so the version of the tokenizers library must stay the same too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dcscale.data.shards.manifest import Manifest, TextInfo
from dcscale.data.shards.tar import content, fail, read_samples
from dcscale.data.storage import Storage
from dcscale.data.tokenizers import Tokenizer, tokenizer_of_shards

_BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class TextReader:
    """Makes documents of the texts in a tar."""

    info: TextInfo
    tokenizer: Tokenizer
    dtype: str

    def samples(self, path: str, data: bytes) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(key, tokens [n], lengths [1]) of each sample of a tar that holds a document.

        Raises:
            DataError: it is no whole tar, or a text is not readable.
        """
        for key, _, tokens in self.documents(path, data):
            yield key, tokens, np.array([len(tokens)], dtype="uint32")

    def documents(self, path: str, data: bytes) -> Iterator[tuple[str, str, np.ndarray]]:
        """(key, text, tokens [n]) of each document of a tar; raises as :meth:`samples`."""
        batch: list[tuple[str, str]] = []
        size = 0
        for key, text in self._texts(path, data):
            batch.append((key, text))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield from self._encode(batch)
                batch, size = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[tuple[str, str]]) -> Iterator[tuple[str, str, np.ndarray]]:
        for (key, text), tokens in zip(batch, self.tokenizer.encode_documents([text for _, text in batch])):
            if len(tokens) > 1:
                yield key, text, tokens.astype(self.dtype)

    def _texts(self, path: str, data: bytes) -> Iterator[tuple[str, str]]:
        for sample in read_samples(path, data):
            if member := sample.members.get(self.info.member):
                yield sample.key, self._text(path, member.name, content(path, data, member))

    def _text(self, path: str, name: str, data: memoryview) -> str:
        try:
            text = str(data, "utf-8")
            if self.info.member == "json":
                value = json.loads(text)
                text = value.get(self.info.field) if isinstance(value, dict) else None
                if isinstance(text, str):
                    text.encode()  # JSON may hold halves of surrogate pairs
        except (ValueError, RecursionError) as error:
            fail(path, f"member {name} is no text in UTF-8, or no JSON: {error}", "mend the tar")
        if not isinstance(text, str):
            field = f"an object whose field {self.info.field!r} is a string"
            fail(
                path, f"member {name} must be {field}", "mend the tar, or write its manifest with another --text-field"
            )
        return text


def open_text(source: Storage, manifest: Manifest) -> TextReader | None:
    """What makes documents of shards that hold text; None for shards that hold tokens.

    Raises:
        DataError: their tokenizer is not there, or is another one.
    """
    if manifest.text is None:
        return None
    return TextReader(manifest.text, tokenizer_of_shards(source, manifest), manifest.dtype)
