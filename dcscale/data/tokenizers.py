"""Tokenizers: raw bytes, or any Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import os
import reprlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, TokenizerInfo, read_manifest
from dcscale.data.storage import LocalStorage, Storage, UnreadableError
from dcscale.files import write_atomically

TOKENIZER_NAME = "tokenizer.json"
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Usual names of the end-of-document token; looked up in the vocabulary if none is given."""


class Tokenizer(ABC):
    """Converts text to token ids and back."""

    spec: str
    """``byte``, or the path of a ``tokenizer.json``; an argument of :func:`load_tokenizer`."""

    fingerprint: str
    """SHA-256 of the definition, in hexadecimal."""

    vocab_size: int
    """One more than the largest token id."""

    eos_id: int
    """Id of the end-of-document token."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end-of-document token.

        Raises:
            ValueError: the text cannot be tokenized, such as half of a surrogate pair.
        """

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Like :meth:`encode`, with the range [begin, end) of characters of ``text`` that each token covers.

        A token may cover only part of a character. Ranges may leave out spaces before the first letter of a token.

        Returns:
            (token ids, (begin, end) of each token).
        """

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without end-of-document tokens; invalid UTF-8 becomes U+FFFD."""

    def decode_continuation(self, prompt_ids: list[int], new_ids: list[int]) -> str:
        """What ``new_ids`` add to the text of ``prompt_ids``, for example by a model that continues a prompt.

        Tokens cannot always be decoded alone: SentencePiece drops the space of the first word, and a character may be
        several tokens. A character that the prompt begins and the new tokens complete belongs to the continuation.
        """
        prompt, text = self.decode(prompt_ids), self.decode([*prompt_ids, *new_ids])
        return text[len(os.path.commonprefix([prompt, text])) :]  # noqa: RUF071 (characters, not paths)

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of complete documents.

        Returns:
            uint32 [tokens of the document, its end-of-document token included] for each document.

        Raises:
            DataError: a document cannot be tokenized.
        """

    def save(self, folder: Path) -> TokenizerInfo:
        """Write the files needed to load the tokenizer into ``folder``; returns its entry in the manifest."""
        return TokenizerInfo(self.spec, self.fingerprint, self.vocab_size, self.eos_id)


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes 0 to 255 as tokens, and 256 as the end-of-document token."""

    spec = "byte"
    fingerprint = hashlib.sha256(b"dcscale byte tokenizer, version 1").hexdigest()
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        offsets = [(at, at + 1) for at, character in enumerate(text) for _ in character.encode()]
        return self.encode(text), offsets

    def decode(self, ids: list[int]) -> str:
        # 0xFF never occurs in UTF-8, so an id outside the vocabulary decodes to one U+FFFD.
        return bytes(min(i, 255) for i in ids if i != self.eos_id).decode(errors="replace")

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        eos = np.array([self.eos_id], dtype=np.uint32)
        return [np.concatenate([np.frombuffer(text.encode(), np.uint8), eos], dtype=np.uint32) for text in texts]


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library.

    Text is never encoded to a special token: ``<|endoftext|>`` in a document stays ordinary text.

    Args:
        path: the ``tokenizer.json``; with ``definition``, only its name for messages.
        eos: name or id of the end-of-document token; None takes the only one of ``EOS_TOKENS`` in the vocabulary.
        definition: content of the file, if it was already read.

    Raises:
        DataError: the library or the file is missing, the file is not a tokenizer, or ``eos`` is not in its vocabulary.
    """

    def __init__(self, path: Path | str, eos: str | int | None = None, definition: bytes | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Library  # optional dependency: byte tokens do not need it
        except ImportError as error:
            raise DataError(
                f"{path}: a {TOKENIZER_NAME} needs the tokenizers package, which is not installed; "
                f"install it with 'pip install tokenizers', or use the tokenizer 'byte'"
            ) from error
        try:
            self._definition = Path(path).read_bytes() if definition is None else definition
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; give 'byte', or a {TOKENIZER_NAME} or its folder. "
                f"'hf download OWNER/MODEL {TOKENIZER_NAME} --local-dir FOLDER' gets that of a model on the Hugging "
                f"Face Hub; if it has none, AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) makes one"
            ) from error
        try:
            self._library = Library.from_buffer(self._definition)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise DataError(f"{path}: is not a Hugging Face {TOKENIZER_NAME}: {error}; give another file") from error
        # Encode special tokens in text as ordinary text, and do not apply the file's own padding and truncation.
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
            named = [name for name, number in vocabulary.items() if number == eos]
            candidates = [eos] if isinstance(eos, str) else named
        if len(candidates) != 1 or candidates[0] not in vocabulary:
            raise DataError(
                f"{self.spec}: the end-of-document token is ambiguous or missing: requested {eos!r}, found "
                f"{candidates} among its {len(vocabulary)} tokens; name one of its tokens with --eos-token"
            )
        return vocabulary[candidates[0]]

    def encode(self, text: str) -> list[int]:
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str) -> Any:
        try:
            return self._library.encode(text, add_special_tokens=False)
        except Exception as error:  # as in encode_documents; TypeError for half of a surrogate pair
            raise DataError(
                f"{self.spec}: cannot tokenize {reprlib.repr(text)}: {error}; give another tokenizer or text"
            ) from error

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i != self.eos_id]
        return self._library.decode(known, skip_special_tokens=False)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, for example for words outside its vocabulary
            raise DataError(f"{self.spec}: cannot tokenize a document: {error}; give another tokenizer") from error
        return [np.array([*encoding.ids, self.eos_id], dtype=np.uint32) for encoding in encodings]

    def save(self, folder: Path) -> TokenizerInfo:
        write_atomically(folder / TOKENIZER_NAME, self._definition)
        return TokenizerInfo(TOKENIZER_NAME, self.fingerprint, self.vocab_size, self.eos_id)


def load_tokenizer(spec: str | Path, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: ``byte``; the path of a ``tokenizer.json``; a folder of shards, whose tokenizer is checked against the
            manifest; or another folder with a ``tokenizer.json``.
        eos: name of the end-of-document token, for a ``tokenizer.json`` outside a folder of shards; None takes the
            only one of ``EOS_TOKENS`` in the vocabulary.

    Raises:
        DataError: there is no such tokenizer, it cannot be loaded, or it is not the one that made the shards.
    """
    if spec == "byte":
        if eos is not None:
            raise DataError(f"the tokenizer is 'byte', whose documents end with token 256, not {eos!r}; leave it out")
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir() and (path / MANIFEST_NAME).exists():
        return load_shard_tokenizer(LocalStorage(path), read_manifest(path))
    return HuggingFaceTokenizer(path / TOKENIZER_NAME if path.is_dir() else path, eos)


def load_shard_tokenizer(storage: Storage, manifest: Manifest) -> Tokenizer:
    """Load the tokenizer that made the tokens of shards.

    Args:
        storage: root of the shards.
        manifest: their manifest.

    Raises:
        DataError: it is missing, cannot be loaded, or is not the one in the manifest.
    """
    expected = manifest.tokenizer
    if expected.spec == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        try:
            definition = storage.read(TOKENIZER_NAME)
        except UnreadableError as error:
            raise DataError(f"{error}; put the tokenizer that made the shards there") from error
        tokenizer = HuggingFaceTokenizer(storage.location(TOKENIZER_NAME), expected.eos_id, definition)
    for name in ("fingerprint", "vocab_size", "eos_id"):
        found, wanted = getattr(tokenizer, name), getattr(expected, name)
        if found != wanted:
            raise DataError(
                f"{storage.location(MANIFEST_NAME)}: tokenizer.{name} is {wanted!r}, but the tokenizer there now has "
                f"{found!r}; put the tokenizer that made the shards back, or make the shards again"
            )
    return tokenizer


def tokenizer_files(storage: Storage, manifest: Manifest) -> dict[str, bytes]:
    """The files of a root of shards that are needed to load its tokenizer elsewhere.

    Returns:
        File name -> content; empty for byte tokens.

    Raises:
        DataError: a file cannot be read.
    """
    return {} if manifest.tokenizer.spec == "byte" else {TOKENIZER_NAME: storage.read(TOKENIZER_NAME)}
