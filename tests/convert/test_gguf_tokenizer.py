"""The tokenizer of a GGUF file's metadata gives the tokens of the one that they describe."""

import json
from itertools import pairwise

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dcscale.convert.formats.gguf_tokenizer import tokenizer_json
from dcscale.data import HuggingFaceTokenizer

TEXTS = [
    "The river's length in 1789 was 12345 km; it isn't far, IT'S NEAR.\n\n  def f(x):\n\treturn x+1\r\n",
    "naïve café 北京 🙂 ½ Ⅷ \u00a0 x  y   z ",
    "<|end|> is text, <think> is a token, </s> <s> <0x41>",
    4 * "parseXML ",
    "",
    " ",
]
CONTROL, USER_DEFINED = 3, 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex):
    return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


PRE = {
    "gpt-2": ([pre_tokenizers.ByteLevel(False)], {}),
    "smollm": ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)], {}),
    "llama-bpe": (split(LLAMA3), {"ignore_merges": True}),
    "tekken": (split(TEKKEN), {"ignore_merges": True}),
    "qwen2": (split(LLAMA3.replace("{1,3}", "")), {}),
}


def byte_level(pre):
    """A tokenizer that was trained with this pre-tokenizer, and its metadata."""
    steps, options = PRE[pre]
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<think>"])
    ids = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = sorted(ids, key=ids.get)
    types = {"<|end|>": CONTROL, "<think>": USER_DEFINED}
    return tokenizer, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def read(metadata, eos):
    return HuggingFaceTokenizer("made", eos, tokenizer_json(metadata).encode())


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokens(pre):
    original, metadata = byte_level(pre)
    made, original = read(metadata, "<|end|>"), HuggingFaceTokenizer("given", "<|end|>", original.to_str().encode())
    assert (made.vocab_size, made.eos_id) == (original.vocab_size, 0)
    for text in TEXTS:
        assert made.encode(text) == original.encode(text)
        if pre != "qwen2":  # NFC changes some texts
            assert made.decode(made.encode(text)) == text
    assert original.encode("<think>") == made.encode("<think>") == [original.vocab_size - 1]
    assert 0 not in made.encode("<|end|>")


def test_pre_tokenizers_differ():
    """So that the test above would notice a wrong one."""
    metadata = byte_level("gpt-2")[1]
    made = [read(metadata | {"tokenizer.ggml.pre": pre}, "<|end|>") for pre in PRE]
    assert len({str([tokenizer.encode(text) for text in TEXTS]) for tokenizer in made}) == len(PRE)


PIECES = {"▁": -1.0, "a": -2.0, "b": -3.0, "<": -4.0, "s": -5.0, ">": -6.0, "/": -7.0, "ab": -9.0, "▁a": -8.0}
PIECES |= {"▁ab": -10.0, "aba": -8.5, "s>": -11.0, "▁▁": -12.0, "▁▁▁": -12.0, "bb": -9.0, "abab": -13.0}


def sentencepiece():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [PIECES.get(token, 0.0) for token in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3, *256 * [6], *len(PIECES) * [1]],
    }


def reference(text, prefix):
    """SentencePiece's rule: of all neighbours that are a token together, merge those of the highest score."""
    parts = list((" " + text if prefix else text).replace(" ", "▁"))
    while True:
        scores = [PIECES.get(left + right, float("-inf")) for left, right in pairwise(parts)]
        if not scores or max(scores) == float("-inf"):
            break
        place = scores.index(max(scores))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    tokens = sentencepiece()["tokenizer.ggml.tokens"]
    return [
        token
        for part in parts
        for token in ([tokens.index(part)] if part in PIECES else [3 + byte for byte in part.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_of_sentencepiece(prefix):
    made = read(sentencepiece() | {"tokenizer.ggml.add_space_prefix": prefix}, "</s>")
    assert (made.vocab_size, made.eos_id) == (3 + 256 + len(PIECES), 2)
    for text in ("ab", "abab aba", " a  b   ab", "abbababb", "é北 a", "<s> </s> <0x41>", "a\nb"):
        assert made.encode(text) == reference(text, prefix)
        assert made.decode(made.encode(text)) == text
    if prefix:
        assert read(sentencepiece(), "</s>").encode("ab") == made.encode("ab")


def test_tokens_that_are_texts_stay_whole():
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"].append("[user]")
    metadata["tokenizer.ggml.scores"].append(0.0)
    metadata["tokenizer.ggml.token_type"].append(USER_DEFINED)
    made = read(metadata, "</s>")
    assert made.vocab_size - 1 in made.encode("ab[user]ab")


INVALID = {
    "kind": ({"model": "t5"}, "its kind 't5' is not known"),
    "no kind": ({"model": None}, "its kind None is not known"),
    "pre-tokenizer": ({"pre": "default"}, "its pre-tokenizer 'default' is not known"),
    "no pre-tokenizer": ({"pre": None}, "its pre-tokenizer None is not known"),
    "no types": ({"token_type": None}, "its token_type are not a list of int"),
    "few types": ({"token_type": [1]}, r"it has \d+ tokens, but 1 token_type"),
    "no tokens": ({"tokens": 3}, "its tokens are not a list of str"),
    "twice": ({"tokens": ["a", "b", "a"]}, "it has the same token twice"),
    "no merges": ({"merges": [1]}, "its merges are not a list of str"),
    "merges of other tokens": ({"merges": ["é à"]}, "it merges 'é à', which are not two tokens that make a third"),
    "merges of three": ({"merges": ["t h e"]}, "it merges 't h e', which are not two tokens"),
}


@pytest.mark.parametrize("name", INVALID)
def test_metadata_that_are_no_tokenizer(name):
    changes, message = INVALID[name]
    metadata = byte_level("gpt-2")[1] | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_json(metadata)


def test_sentencepiece_that_is_refused():
    metadata = sentencepiece()
    metadata["tokenizer.ggml.scores"].pop()
    with pytest.raises(ValueError, match="it has 275 tokens, but 274 scores"):
        tokenizer_json(metadata)
    metadata = sentencepiece()
    metadata["tokenizer.ggml.token_type"][-2] = USER_DEFINED
    metadata["tokenizer.ggml.tokens"][-2] = "▁x"
    with pytest.raises(ValueError, match="'▁x' is defined by the user, and has spaces"):
        tokenizer_json(metadata)
