"""The tokenizer in a GGUF file's metadata as a tokenizer.json.

The metadata hold tokens, merges or scores, and the name of the pre-tokenizer (``tokenizer.ggml.pre``), whose regular
expression is in llama.cpp's code. A kind that is not known here is left out: a guess would tokenize some texts
differently, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcscale.convert.formats.huggingface import json_text

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Values of ``tokenizer.ggml.token_type``."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
    "tekken": _TEKKEN,
}
"""Regular expression of the pre-tokenizer, by its name."""
_GPT2 = "gpt-2"
_DIGITS = ("smollm", "starcoder", "refact")
"""Pre-tokenizers that split off every digit and then are GPT-2's."""


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The content of a tokenizer.json.

    Raises:
        ValueError: the tokenizer is of an unknown kind, or the metadata do not describe one.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its kind {kind!r} is not known here")
    if kind == "gpt2" and pre not in (*_SPLITS, _GPT2, *_DIGITS):
        raise ValueError(f"its pre-tokenizer {pre!r} is not known here")
    tokens = _list(metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise ValueError("it has the same token twice")
    types = dict(zip(tokens, _list(metadata, "token_type", int, len(tokens))))
    parts = _byte_level(types, metadata) if kind == "gpt2" else _sentencepiece(types, metadata)
    return json_text({"version": "1.0", "added_tokens": _added_tokens(types), "post_processor": None, **parts})


def tokenizer_config(metadata: Mapping[str, Any]) -> str:
    """The content of a tokenizer_config.json: special tokens, and the template of chats."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    settings = {name: tokens[number] for name, number in ids.items() if number in range(len(tokens))}
    template = metadata.get("tokenizer.chat_template")
    return json_text(settings | ({"chat_template": template} if isinstance(template, str) else {}))


def _list(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of the metadata, checked. A list without elements has no type in GGUF."""
    values = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ValueError(f"its {name} are not a list of {kind.__name__}")
    if length is not None and len(values) != length:
        raise ValueError(f"it has {length} tokens, but {len(values)} {name}")
    return values


def _bpe(types: Mapping[str, int], merges: list[tuple[str, ...]], **options: Any) -> dict[str, Any]:
    """The model of a tokenizer.json."""
    ids = {token: number for number, token in enumerate(types)}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= ids.keys():
            raise ValueError(f"it merges {' '.join(merge)!r}, which are not two tokens that make a third")
    return {"type": "BPE", "vocab": ids, "merges": merges, **options}


def _byte_level(types: Mapping[str, int], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """BPE of bytes, as of GPT-2, Llama 3 and Qwen."""
    pre = metadata["tokenizer.ggml.pre"]
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    split = _SPLITS.get(pre)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split is None}
    steps = [byte_level]
    if split is not None:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    elif pre in _DIGITS:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,  # as in Qwen's own tokenizer.json
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        # As in llama.cpp: with these two, a word that is a token is not put together by merges.
        "model": _bpe(types, merges, ignore_merges=split in (_LLAMA3, _TEKKEN)),
    }


def _sentencepiece(types: Mapping[str, int], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """BPE of SentencePiece, as of Llama 2 and Mistral, with merges that follow from the scores."""
    scores = dict(zip(types, _list(metadata, "scores", float, len(types))))
    # Others, such as <s>, must not come from merging the characters of a text.
    normal = [token for token, kind in types.items() if kind == _NORMAL]
    merges = [
        (token[:place], token[place:])
        for token in normal
        for place in range(1, len(token))
        if types.get(token[:place]) == types.get(token[place:]) == _NORMAL
    ]
    # The order of transformers' generate_merges.
    merges.sort(key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))
    unknown = next((token for token, kind in types.items() if kind == _UNKNOWN), None)
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(types, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _added_tokens(types: Mapping[str, int]) -> list[dict[str, Any]]:
    """The tokens that are matched in a text as a whole."""
    added = []
    for number, (token, kind) in enumerate(types.items()):
        if kind == _USER_DEFINED and "▁" in token:
            raise ValueError(f"its token {token!r} is defined by the user, and has spaces")
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": number, "content": token, **rules, "special": kind != _USER_DEFINED})
    return added
