"""A folder for Hugging Face transformers: dcscale's tensors under their own names, and the files around them.

The network itself is in modeling_dcscale.py beside this module, which is copied into the folder as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcscale.config import Config, ConfigError, check_config, from_dict
from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError

MODEL_TYPE = "dcscale"
FORMAT = 1
"""Of config.json, under ``dcscale``: raised with every switch of the network that an older file would not know."""

MODELING = "modeling_dcscale.py"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FILES = (MODELING, TOKENIZER, TOKENIZER_CONFIG, "generation_config.json", "special_tokens_map.json")
"""What lies beside config.json and the tensors."""

_BYTE_EOS = "<|endoftext|>"
_HOW_IT_RUNS = ("backend", "scratch_mib")
"""Fields of ``model`` without a meaning for the function: they are not written, and have their defaults when read."""
_RENAMED = {"tied_embeddings": "tie_word_embeddings", "rope_scaling": "rope_frequency_scaling"}
"""The first is transformers' word; what transformers calls rope_scaling it would change on the way."""

_OTHERS = {
    *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_position_embeddings"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "dcscale", "_attn_implementation_autoset"),
}
"""Settings that transformers may write, without a meaning for the network, and those that are read by name."""


def write_settings(config: Config, dtype: str, tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of config.json. ``dtype`` by torch's name; ``tokenizer`` as in a checkpoint's state."""
    model = {_RENAMED.get(n, n): value for n, value in asdict(config.model).items() if n not in _HOW_IT_RUNS}
    classes = {"AutoConfig": "DCScaleConfig", "AutoModelForCausalLM": "DCScaleForCausalLM"}
    settings = {
        "architectures": ["DCScaleForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {auto: f"{Path(MODELING).stem}.{name}" for auto, name in classes.items()},
        "dtype": dtype,
        **model,
        "max_position_embeddings": config.data.sequence_length,
        "use_cache": True,
        "dcscale": {"format": FORMAT},
    }
    if tokenizer is not None:
        settings |= {"eos_token_id": tokenizer["eos_id"], "pad_token_id": tokenizer["eos_id"]}
        if tokenizer["spec"] == "byte":
            settings["dcscale"]["tokenizer"] = "byte"
    return settings


def read_settings(settings: Mapping[str, Any]) -> Config:
    """The config of a model whose config.json has these settings.

    Raises:
        ConversionError: a setting is missing, unknown or of no use; the message names it.
    """
    beyond = settings.get("dcscale")
    found = beyond.get("format") if isinstance(beyond, dict) else None
    if found != FORMAT:
        raise ConversionError(f"its config has dcscale.format {found!r}, this version of dcscale reads {FORMAT}")
    names = {_RENAMED.get(name, name): name for name in asdict(ModelConfig()) if name not in _HOW_IT_RUNS}
    missing = sorted(names.keys() - settings.keys())
    if missing:
        raise ConversionError(f"its config lacks {', '.join(missing)}: every switch of the network must be there")
    unknown = sorted(settings.keys() - names.keys() - _OTHERS)
    if unknown:
        raise ConversionError(
            f"its config has the unknown {', '.join(unknown)}: remove what does not change the network from config.json"
        )
    model = {name: settings[theirs] for theirs, name in names.items()}
    length = settings.get("max_position_embeddings", 1024)
    try:
        config = from_dict({"model": model, "data": {"sequence_length": length}}, "config.json")
    except ConfigError as error:
        raise ConversionError(f"its config cannot be used: {error}") from error
    problems = [p for p in check_config(config) if p.path.startswith(("model.", "data.sequence_length"))]
    if problems:
        raise ConversionError(f"its config cannot be used: {ConfigError(problems)}")
    return config


def files_beside(
    config: Config, tokenizer: Mapping[str, Any] | None, definition: Path
) -> tuple[dict[str, str], list[str]]:
    """Files by name that go beside config.json and the tensors, and notes on them.

    ``definition`` is where the checkpoint has its tokenizer.json, if it has one.
    """
    files = {MODELING: Path(__file__).with_name(MODELING).read_text(encoding="utf-8")}
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer["eos_id"], "pad_token_id": tokenizer["eos_id"]}
    files["generation_config.json"] = _json({**ends, "use_cache": True})
    if tokenizer is None or not (tokenizer["spec"] == "byte" or definition.is_file()):
        return files, [f"the source has no tokenizer: put a {TOKENIZER} and its {TOKENIZER_CONFIG} into the result"]
    notes = []
    if tokenizer["spec"] == "byte":
        content = byte_tokenizer()
        files[TOKENIZER] = _json(content)
    else:
        try:
            content = json.loads(definition.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(f"{definition} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ConversionError(f"{definition} must hold a JSON object, but holds a {type(content).__name__}")
        if content.get("post_processor") is not None:
            notes.append(
                f"{TOKENIZER} has a post-processor: where it adds special tokens, which dcscale leaves out in "
                "training, call the tokenizer with add_special_tokens=False"
            )
    eos = _name_of(content, tokenizer["eos_id"])
    if eos is None:
        raise ConversionError(f"{definition} has no token of the id {tokenizer['eos_id']}, which ends a document")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": config.data.sequence_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # As in dcscale: a special token's name that is written in a text is text.
        "split_special_tokens": True,
    }
    files[TOKENIZER_CONFIG] = _json(settings)
    return files, notes


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json with the ids of dcscale's byte tokenizer: the 256 bytes of UTF-8, and 256 for the end."""
    whole = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 256,
                "content": _BYTE_EOS,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **whole},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **whole},
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(_byte_characters())}, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in the library's ByteLevel (GPT-2's table): printable ones themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _name_of(definition: Mapping[str, Any], token_id: int) -> str | None:
    """The token of this id in a tokenizer.json."""
    for added in definition.get("added_tokens", []):
        if added.get("id") == token_id:
            return added.get("content")
    vocabulary = definition.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        return next((name for name, number in vocabulary.items() if number == token_id), None)
    return vocabulary[token_id][0] if 0 <= token_id < len(vocabulary) else None  # Unigram: [name, score] by id


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
