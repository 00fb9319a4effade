"""Folders for Hugging Face transformers: dcscale's model under its own tensor names, and the files it needs there.

The network is in modeling_dcscale.py next to this module, which is copied into the folder unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dcscale.config import Config, ConfigError, check_config, from_dict
from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.settings import check_known
from dcscale.convert.tensor_files import open_tensors
from dcscale.convert.tensor_map import (
    TOKENIZER,
    Exported,
    Format,
    Imported,
    Source,
    check_layer_count,
    model_type_of,
    read_config_json,
    same_names_plan,
)
from dcscale.files import read_json

MODEL_TYPE = "dcscale"
FORMAT_VERSION = 1
"""Version of config.json, under ``dcscale``. Increase it with every setting that older code would have to know."""

MODELING = "modeling_dcscale.py"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE, GENERATION_CONFIG = "chat_template.jinja", "generation_config.json"

_BYTE_EOS = "<|endoftext|>"
_NOT_EXPORTED = ("backend", "scratch_mib")
"""Fields of ``model`` that do not change what it computes: they are not written, and get their defaults when read."""

_RENAMED = {"tied_embeddings": "tie_word_embeddings", "rope_scaling": "rope_frequency_scaling"}
"""Fields of ``model`` with another name in config.json. The first is transformers' name; a key called rope_scaling
would be rewritten by transformers."""

_READ_ELSEWHERE = ("max_position_embeddings", "dcscale")

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "chat_template", "add_bos_token", "add_eos_token"),
    *("add_prefix_space", "split_special_tokens", "clean_up_tokenization_spaces"),
    *("model_max_length", "truncation_side"),
)
"""What an export takes over of a source's tokenizer_config.json. The rest names classes and files of the source."""
_NOT_FOR_GENERATION = ("transformers_version", "cache_implementation", "cache_config", "output_attentions")
"""What an export drops of a source's generation_config.json, because its model refuses it or it does not matter."""


def kept_files(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files that say how the tokenizer and ``generate()`` are used: a model folder keeps them for a later export.

    Args:
        folder: a folder of any format.
        settings: content of its config.json, whose token ids generation_config.json gets where it lacks them.

    Returns:
        Their content by name; without those that the folder does not have.

    Raises:
        ConversionError: a file cannot be read, or is not a JSON object.
    """
    files = {}
    generation = {name: settings[name] for name in _TOKEN_IDS if settings.get(name) is not None}
    if (folder / GENERATION_CONFIG).is_file():
        generation |= read_json(folder / GENERATION_CONFIG, ConversionError)
    if generation:
        files[GENERATION_CONFIG] = json_text(generation)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (folder / name).is_file():
            files[name] = json_text(read_json(folder / name, ConversionError))
    try:
        if (folder / CHAT_TEMPLATE).is_file():
            files[CHAT_TEMPLATE] = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{folder / CHAT_TEMPLATE} cannot be read: {error}") from error
    return files


def write_settings(
    config: Config, dtype: str, tokenizer: Mapping[str, Any] | None, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        dtype: the tensors' type by torch's name, such as ``bfloat16``.
        tokenizer: as in a checkpoint's state.json.
        generation: content of generation_config.json, which has the ids of special tokens.
    """
    model = {_RENAMED.get(n, n): value for n, value in asdict(config.model).items() if n not in _NOT_EXPORTED}
    # Other programs than transformers expect numbers here.
    model["kv_heads"] = config.model.kv_heads or config.model.heads
    model["head_dim"] = config.model.head_dim or config.model.dim // config.model.heads
    classes = {"AutoConfig": "DCScaleConfig", "AutoModelForCausalLM": "DCScaleForCausalLM"}
    settings = {
        "architectures": ["DCScaleForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {auto: f"{Path(MODELING).stem}.{name}" for auto, name in classes.items()},
        "dtype": dtype,
        **model,
        "max_position_embeddings": config.data.sequence_length,
        "use_cache": True,
        "dcscale": {"format": FORMAT_VERSION},
        **{name: generation[name] for name in _TOKEN_IDS if name in generation},
    }
    if tokenizer is not None and tokenizer["spec"] == "byte":
        settings["dcscale"]["tokenizer"] = "byte"
    return settings


def generation_settings(tokenizer: Mapping[str, Any] | None, kept: Mapping[str, str]) -> dict[str, Any]:
    """The content of generation_config.json; ``kept`` is from :func:`kept_files`."""
    end = {} if tokenizer is None else {"eos_token_id": tokenizer["eos_id"], "pad_token_id": tokenizer["eos_id"]}
    given = json.loads(kept.get(GENERATION_CONFIG, "{}"))
    given = {name: value for name, value in given.items() if value is not None and not name.startswith("_")}
    return {
        **end,
        "use_cache": True,
        **{name: value for name, value in given.items() if name not in _NOT_FOR_GENERATION},
    }


def read_settings(settings: Mapping[str, Any]) -> Config:
    """The config of a model whose config.json has these settings.

    Raises:
        ConversionError: a setting is missing, unknown or invalid; the message names it.
    """
    own = settings.get("dcscale")
    version = own.get("format") if isinstance(own, dict) else None
    if version != FORMAT_VERSION:
        raise ConversionError(
            f"its config has dcscale.format {version!r}, this version of dcscale reads {FORMAT_VERSION}"
        )
    # Every setting must be present: a default of this version may differ from that of the version that wrote the file.
    names = {_RENAMED.get(name, name): name for name in asdict(ModelConfig()) if name not in _NOT_EXPORTED}
    missing = sorted(names.keys() - settings.keys())
    if missing:
        raise ConversionError(f"its config lacks {', '.join(missing)}: every setting of the network is required")
    check_known(settings, {*names, *_READ_ELSEWHERE})
    model = {name: settings[key] for key, name in names.items()}
    length = settings.get("max_position_embeddings", 1024)
    try:
        config = from_dict({"model": model, "data": {"sequence_length": length}}, "config.json")
    except ConfigError as error:
        raise ConversionError(f"its config cannot be used: {error}") from error
    problems = [p for p in check_config(config) if p.path.startswith(("model.", "data.sequence_length"))]
    if problems:
        raise ConversionError(f"its config cannot be used: {ConfigError(problems)}")
    return config


def extra_files(
    config: Config, tokenizer: Mapping[str, Any] | None, tokenizer_file: Path, kept: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Files besides config.json, generation_config.json and the tensors, by name, and notes on them.

    Args:
        tokenizer: as in a checkpoint's state.json.
        tokenizer_file: the checkpoint's tokenizer.json, if there is one.
        kept: from :func:`kept_files`.

    Raises:
        ConversionError: the tokenizer cannot be read, or has no token that ends a document.
    """
    files = {MODELING: Path(__file__).with_name(MODELING).read_text(encoding="utf-8")}
    if tokenizer is None or not (tokenizer["spec"] == "byte" or tokenizer_file.is_file()):
        return files, [f"the source has no tokenizer: add a {TOKENIZER} and its {TOKENIZER_CONFIG} to the result"]
    notes = []
    if tokenizer["spec"] == "byte":
        content = byte_tokenizer()
        files[TOKENIZER] = json_text(content)
    else:
        content = read_json(tokenizer_file, ConversionError)
        if content.get("post_processor") is not None:
            notes.append(
                f"{TOKENIZER} has a post-processor: if it adds special tokens, which dcscale does not use in "
                "training, call the tokenizer with add_special_tokens=False"
            )
    try:
        eos = _token_of(content, tokenizer["eos_id"])
    except (AttributeError, IndexError, TypeError) as error:
        raise ConversionError(f"{tokenizer_file} is not a {TOKENIZER} of Hugging Face: {error}") from error
    if eos is None:
        raise ConversionError(f"{tokenizer_file} has no token with the id {tokenizer['eos_id']}, which ends a document")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": config.data.sequence_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if kept.keys() & {TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE}:
        settings |= _given_tokenizer_settings(kept)
    else:
        settings["split_special_tokens"] = True  # as in dcscale: a special token's name inside a text is ordinary text
    files[TOKENIZER_CONFIG] = json_text(settings)
    if CHAT_TEMPLATE in kept:
        files[CHAT_TEMPLATE] = kept[CHAT_TEMPLATE]
    return files, notes


def _given_tokenizer_settings(kept: Mapping[str, str]) -> dict[str, Any]:
    """What an export takes over of tokenizer_config.json, and of special_tokens_map.json, which older sources have."""
    given = {**json.loads(kept.get(SPECIAL_TOKENS, "{}")), **json.loads(kept.get(TOKENIZER_CONFIG, "{}"))}
    return {name: _without_rules(given[name]) for name in _TOKENIZER_SETTINGS if given.get(name) is not None}


def _without_rules(value: Any) -> Any:
    """A special token, or a list of them, by its text only: how it is matched is in tokenizer.json."""
    if isinstance(value, list):
        return [_without_rules(item) for item in value]
    return value.get("content", value) if isinstance(value, dict) else value


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json with the ids of dcscale's byte tokenizer: 0 to 255 for the bytes of UTF-8, 256 for the end."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
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
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        # BPE without merges: every byte stays a token of its own.
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(_byte_characters())}, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The character by which ByteLevel represents each byte (GPT-2's table): printable bytes represent themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _token_of(tokenizer: Mapping[str, Any], token_id: int) -> str | None:
    """The token with this id in a tokenizer.json; None if there is none."""
    for added in tokenizer.get("added_tokens", []):
        if added.get("id") == token_id:
            return added.get("content")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        return next((token for token, number in vocabulary.items() if number == token_id), None)
    return vocabulary[token_id][0] if 0 <= token_id < len(vocabulary) else None  # Unigram: [token, score] by id


def json_text(value: Any) -> str:
    """The content of a JSON file of a model folder."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _detect(path: Path) -> Source | None:
    settings = read_config_json(path)
    if model_type_of(settings, (MODEL_TYPE,)) is None:
        return None
    return Source("huggingface", path, f"Hugging Face folder of a dcscale model {path}", settings)


def _load(source: Source) -> Imported:
    files = open_tensors(source.folder)
    config = read_settings(source.settings)
    check_layer_count("layers", source.settings, files)
    byte_tokens = source.settings["dcscale"].get("tokenizer") == "byte"
    return Imported(files, config, same_names_plan(config.model), [], byte_tokens)


def _export(config: Config, dtype: torch.dtype, tokenizer: Mapping[str, Any] | None, tokenizer_file: Path) -> Exported:
    kept = {} if tokenizer is None or tokenizer["spec"] == "byte" else kept_files(tokenizer_file.parent, {})
    generation = generation_settings(tokenizer, kept)
    settings = write_settings(config, str(dtype).removeprefix("torch."), tokenizer, generation)
    files, notes = extra_files(config, tokenizer, tokenizer_file, kept)
    files[GENERATION_CONFIG] = json_text(generation)
    return Exported(same_names_plan(config.model), settings, notes, files)


FORMAT = Format(
    name="huggingface",
    looks_for=f"config.json with model_type {MODEL_TYPE} (exported by dcscale)",
    detect=_detect,
    load=_load,
    export=_export,
    files=(MODELING, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, GENERATION_CONFIG),
)
