"""Tokenizers: raw bytes, or any Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, TokenizerInfo, read_manifest
from dcscale.data.storage import LocalStorage, Storage, UnreadableError
from dcscale.files import write_atomically

TOKENIZER_NAME = "tokenizer.json"
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names under which an end-of-document token is looked for when none is given."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    spec: str
    """``byte``, or the path of a ``tokenizer.json``: what :func:`load_tokenizer` takes."""

    fingerprint: str
    """SHA-256 of the definition."""

    vocab_size: int
    """One more than the largest token id."""

    eos_id: int
    """The token that ends a document."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end-of-document token."""

    @abstractmethod
    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and for each token the characters [begin, end) of ``text`` that it stands for, at least in part.

        Spaces before a token's first letter may be missing there.
        """

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids; end-of-document tokens give none, bytes that are not UTF-8 give U+FFFD."""

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of whole documents, each with its end-of-document token: uint32 [tokens] each."""

    def save(self, folder: Path) -> TokenizerInfo:
        """Put what is needed to load it again into ``folder``; returns its entry in the manifest."""
        return TokenizerInfo(self.spec, self.fingerprint, self.vocab_size, self.eos_id)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 as end of document."""

    spec = "byte"
    fingerprint = hashlib.sha256(b"dcscale byte tokenizer, version 1").hexdigest()
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        places = [(at, at + 1) for at, character in enumerate(text) for _ in character.encode()]
        return self.encode(text), places

    def decode(self, ids: list[int]) -> str:
        # 0xFF is never part of UTF-8, so an id beyond the vocabulary shows as one U+FFFD.
        return bytes(min(i, 255) for i in ids if i != self.eos_id).decode(errors="replace")

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        ends = np.array([self.eos_id], dtype=np.uint32)
        return [np.concatenate([np.frombuffer(text.encode(), np.uint8), ends], dtype=np.uint32) for text in texts]


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library.

    Text never becomes a special token: a document in which ``<|endoftext|>`` is written keeps it as text.

    Args:
        path: the ``tokenizer.json``, or with ``definition`` whatever names it.
        eos: name or id of the token that ends a document; None takes the one of ``EOS_TOKENS`` that it has.
        definition: what is in the file, where it was read already.

    Raises:
        DataError: the library or the file is missing, the file is not a tokenizer, or ``eos`` is not a token of it.
    """

    def __init__(self, path: Path | str, eos: str | int | None = None, definition: bytes | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Library  # optional: byte tokens need no library
        except ImportError as error:
            raise DataError(
                f"{path}: a {TOKENIZER_NAME} needs the tokenizers package, which is not installed; "
                f"install it with 'pip install tokenizers', or use the tokenizer 'byte'"
            ) from error
        try:
            self._definition = Path(path).read_bytes() if definition is None else definition
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; give 'byte' or a {TOKENIZER_NAME}") from error
        try:
            self._library = Library.from_buffer(self._definition)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise DataError(f"{path}: is not a Hugging Face {TOKENIZER_NAME}: {error}; give another file") from error
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.spec = str(path)
        self.fingerprint = hashlib.sha256(self._definition).hexdigest()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_id = self._find_eos(vocabulary, eos)

    def _find_eos(self, vocabulary: dict[str, int], eos: str | int | None) -> int:
        if eos is None:
            candidates = [name for name in EOS_TOKENS if name in vocabulary]
        else:
            candidates = [self._library.id_to_token(eos) if isinstance(eos, int) else eos]
        if len(candidates) != 1 or candidates[0] not in vocabulary:
            raise DataError(
                f"{self.spec}: the token that ends a document is not clear: asked for {eos!r}, found {candidates} "
                f"among its {len(vocabulary)} tokens; name one of its tokens with --eos-token"
            )
        return vocabulary[candidates[0]]

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._library.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i != self.eos_id]
        return self._library.decode(known, skip_special_tokens=False)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, such as for words that its vocabulary lacks
            raise DataError(f"{self.spec}: cannot tokenise a document: {error}; give another tokenizer") from error
        return [np.array([*encoding.ids, self.eos_id], dtype=np.uint32) for encoding in encodings]

    def save(self, folder: Path) -> TokenizerInfo:
        write_atomically(folder / TOKENIZER_NAME, self._definition)
        return TokenizerInfo(TOKENIZER_NAME, self.fingerprint, self.vocab_size, self.eos_id)


def load_tokenizer(spec: str | Path, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: ``byte``; the path of a ``tokenizer.json``; or a folder that holds shards (their tokenizer, checked
            against the manifest) or just a ``tokenizer.json``.
        eos: name of the token that ends a document, for a ``tokenizer.json`` outside a folder of shards; None takes
            the one of ``EOS_TOKENS`` that it has.

    Raises:
        DataError: there is no such tokenizer, it cannot be loaded, or it is not the one that made the shards.
    """
    if spec == "byte":
        if eos is not None:
            raise DataError(f"the tokenizer is 'byte', whose documents end with token 256, not {eos!r}; leave that out")
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir() and (path / MANIFEST_NAME).exists():
        return tokenizer_of_shards(LocalStorage(path), read_manifest(path))
    return HuggingFaceTokenizer(path / TOKENIZER_NAME if path.is_dir() else path, eos)


def tokenizer_of_shards(source: Storage, manifest: Manifest) -> Tokenizer:
    """The tokenizer of shards.

    Args:
        source: root of the shards.
        manifest: what is known about them.

    Raises:
        DataError: it is not there, cannot be loaded, or is not the one that the manifest names.
    """
    expected = manifest.tokenizer
    if expected.spec == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        try:
            definition = source.read(TOKENIZER_NAME)
        except UnreadableError as error:
            raise DataError(f"{error}; put the tokenizer that made the shards there") from error
        tokenizer = HuggingFaceTokenizer(source.where(TOKENIZER_NAME), expected.eos_id, definition)
    for name in ("fingerprint", "vocab_size", "eos_id"):
        found, wanted = getattr(tokenizer, name), getattr(expected, name)
        if found != wanted:
            raise DataError(
                f"{source.where(MANIFEST_NAME)}: tokenizer.{name} is {wanted!r}, but the tokenizer there now has "
                f"{found!r}; put the tokenizer that made the shards back, or make the shards again"
            )
    return tokenizer


def tokenizer_files(source: Storage, manifest: Manifest) -> dict[str, bytes]:
    """Files of a root of shards that are needed to load its tokenizer elsewhere, by name; none for byte tokens.

    Raises:
        DataError: one cannot be read.
    """
    return {} if manifest.tokenizer.spec == "byte" else {TOKENIZER_NAME: source.read(TOKENIZER_NAME)}
