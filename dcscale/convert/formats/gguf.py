"""GGUF files (llama.cpp) of Llama, Qwen2 and Qwen3 models, converted like the same models of transformers.

The metadata become settings of transformers' config, so that :mod:`dcscale.convert.formats.transformers` checks them
and plans the tensors; only names differ. Quantized tensors are dequantized to float32. The ``gguf`` package reads the
file, one tensor at a time.

For the architecture ``llama``, which is also that of Mistral, llama.cpp rotates neighbouring pairs of dimensions: its
converter has interleaved the rows of q and k, which is undone here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats.gguf_tokenizer import tokenizer_config, tokenizer_json
from dcscale.convert.formats.huggingface import TOKENIZER_CONFIG
from dcscale.convert.formats.transformers import plan_upcycle, read_config
from dcscale.convert.settings import check_known
from dcscale.convert.tensor_files import TensorFiles
from dcscale.convert.tensor_map import (
    TOKENIZER,
    DroppedTensor,
    Format,
    Imported,
    Plan,
    Source,
    TensorRule,
    check_layer_count,
)
from dcscale.ops import llama3_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MAX_METADATA = 1 << 22
"""Elements of all arrays of metadata: the reader takes about 250 bytes for each. Vocabularies have below 10^6."""

# GGUF's names of dcscale's modules; {} is the layer.
_MODULES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "blk.{}.attn_norm",
    "ffn_norm": "blk.{}.ffn_norm",
    "attention.q": "blk.{}.attn_q",
    "attention.k": "blk.{}.attn_k",
    "attention.v": "blk.{}.attn_v",
    "attention.out": "blk.{}.attn_output",
    "attention.q_norm": "blk.{}.attn_q_norm",
    "attention.k_norm": "blk.{}.attn_k_norm",
    "ffn.gate": "blk.{}.ffn_gate",
    "ffn.up": "blk.{}.ffn_up",
    "ffn.down": "blk.{}.ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"
"""What RoPE's frequencies are divided by."""

# Metadata of the architecture, without its prefix, by the name of the setting in transformers.
_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
_CHECKED = ("attention.value_length", "rope.dimension_count")
"""Widths of a head that must be equal to its width."""
_HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
_OFF = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "logit_scale": 1, "rope.scale_linear": 1}
_OTHER_PREFIXES = ("GGUF.", "general.", "tokenizer.", "quantize.", "split.")
"""Metadata on the file, its tokenizer, and how it was quantized or split."""


class GGUFFiles(TensorFiles):
    """The tensors of a GGUF file, as float32, and its ``metadata``.

    Raises:
        ConversionError: the gguf package is not installed; or the file is corrupt, or has a type of tensor that the
            package cannot dequantize.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            import gguf
        except ImportError as error:
            raise ConversionError(f"{path} needs the gguf package: pip install gguf") from error

        class Reader(gguf.GGUFReader):
            """Refuses a file that is shorter than it says, which the package reads as if it were longer."""

            elements = 0

            def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> np.ndarray:
                part = super()._get(offset, dtype, count, **order)
                if len(part) != count:
                    raise ValueError("the file ends too early, or was not downloaded completely")
                return part

            def _get_field_parts(self, offset: int, kind: int) -> tuple:
                if kind == gguf.GGUFValueType.ARRAY:
                    self.elements += int(self._get(offset + 4, np.uint64)[0])
                    if self.elements > _MAX_METADATA:
                        raise ValueError(f"its metadata have arrays of {self.elements} elements")
                return super()._get_field_parts(offset, kind)

        try:
            reader = Reader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package raises almost any for a corrupt file
            raise ConversionError(f"{path} cannot be read as GGUF: {error!r}") from error
        if reader.byte_order == "S":
            raise ConversionError(f"{path} is for processors of the other byte order, which cannot be read")
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        for kind in {tensor.tensor_type for tensor in reader.tensors}:
            try:
                gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
            except NotImplementedError as error:
                names = [tensor.name for tensor in reader.tensors if tensor.tensor_type == kind]
                raise ConversionError(
                    f"{path} has {len(names)} tensors of the type {kind.name}, such as {names[0]}, which the gguf "
                    "package cannot dequantize: quantize the model to another type"
                ) from error
        for tensor in reader.tensors:
            # GGUF's first dimension is the one whose elements are next to each other.
            self._add(tensor.name, tuple(map(int, reversed(tensor.shape))), torch.float32)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self._tensors[name]
        data = tensor.data if rows is None else tensor.data[rows[0] : rows[1]]
        # A copy where needed: float32 is not dequantized, and the file is mapped read-only.
        return torch.from_numpy(np.require(self._dequantize(data, tensor.tensor_type), np.float32, ["C", "W"]))


def read_settings(files: GGUFFiles) -> dict[str, Any]:
    """The metadata as settings of transformers' config.

    Raises:
        ConversionError: they are not those of a supported model.
    """
    metadata = files.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{files.source} has the architecture {architecture!r}, but must have {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("general.type", "model") != "model":
        raise ConversionError(f"{files.source} is a {metadata['general.type']!r}, not a whole model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConversionError(
            f"{files.source} is one of {metadata['split.count']} files: merge them with llama-gguf-split --merge"
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    others = {key: value for key, value in metadata.items() if not key.startswith((prefix, *_OTHER_PREFIXES))}
    known = {*_SETTINGS.values(), *_CHECKED, "rope.scaling.type", "rope.scaling.factor"}
    check_known({**own, **others}, known, harmless=_HARMLESS, off=_OFF, file=f"{files.source} (gguf-new-metadata)")
    # Numbers are float32: 9.999999747378752e-06 was 1e-05.
    own = {key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in own.items()}
    missing = [prefix + _SETTINGS[name] for name in _REQUIRED if _SETTINGS[name] not in own]
    if missing:
        raise ConversionError(f"{files.source} lacks {', '.join(missing)}")
    s = {name: own[key] for name, key in _SETTINGS.items() if key in own}
    s = {"vocab_size": _rows(files, "token_embd.weight"), "max_position_embeddings": 2048, **s}
    wrong = [
        f"{prefix}{_SETTINGS[name]} is {value!r}, but must be one number"
        for name, value in s.items()
        if type(value) not in (int, float)
    ]
    if wrong:
        raise ConversionError(f"{files.source} cannot be converted: {'; '.join(wrong)}")
    s.setdefault("head_dim", s["hidden_size"] // max(1, s["num_attention_heads"]))
    for key in _CHECKED:
        if own.get(key, s["head_dim"]) != s["head_dim"]:
            raise ConversionError(f"{files.source} has {prefix}{key} {own[key]!r}, but heads of {s['head_dim']}")
    s |= {"model_type": architecture, "rope_scaling": _rope_scaling(files, own, s)}
    if architecture != "qwen2":
        s["attention_bias"] = "blk.0.attn_q.bias" in files.shapes
    if architecture == "llama":
        s["mlp_bias"] = "blk.0.ffn_up.bias" in files.shapes
    return s


def _rows(files: GGUFFiles, name: str) -> int:
    if len(files.shapes.get(name, ())) != 2:
        raise ConversionError(f"{files.source} has no matrix {name}")
    return files.shapes[name][0]


def _rope_scaling(files: GGUFFiles, own: Mapping[str, Any], s: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` of transformers' config."""
    factor = own.get("rope.scaling.factor")
    # llama.cpp's default.
    kind = own.get("rope.scaling.type", "none" if factor is None else "linear")
    if _ROPE_FACTORS not in files.shapes:
        return None if kind == "none" else {"rope_type": kind, "factor": factor}
    # llama.cpp's converter replaces the settings of llama3 by their result; those of Llama 3.1 to 3.3 are tried here.
    factors = files.read(_ROPE_FACTORS).double()
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling |= {"rope_type": "llama3", "factor": factors.max().item()}
    dim = s["head_dim"]
    frequencies = s.get("rope_theta", 10000.0) ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim)
    expected = frequencies / llama3_frequencies(frequencies, scaling["factor"], 1.0, 4.0, 8192)
    if kind != "none" or factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-5):
        raise ConversionError(
            f"{files.source} has {_ROPE_FACTORS} {list(factors.shape)} from {factors.min():.4g} to "
            f"{factors.max():.4g}: only the RoPE of Llama 3.1 to 3.3 is supported"
        )
    return scaling


def _plan(config: ModelConfig, architecture: str, biases: Collection[str], files: GGUFFiles, seed: int) -> Plan:
    plan = plan_upcycle(config, _MODULES, biases, files.dtypes, seed)
    rope_factors = {_ROPE_FACTORS: DroppedTensor("RoPE scaling, now in the config")}
    plan = replace(plan, dropped={**plan.dropped, **rope_factors})
    if architecture != "llama":
        return plan
    heads_of = {"q": config.heads, "k": config.kv_heads or config.heads}

    def undo(rule: TensorRule) -> TensorRule:
        part = re.fullmatch(r"blocks\.\d+\.attention\.([qk])\.(weight|bias)", rule.name)
        if part is None or not rule.sources:
            return rule
        make = functools.partial(_deinterleave, heads_of[part[1]])
        return replace(rule, how="the rows of each head are no longer interleaved", make=make)

    return replace(plan, rules=[undo(rule) for rule in plan.rules])


def _deinterleave(heads: int, rows: Tensor) -> Tensor:
    """The rows [H, 2, D/2] of q or k, or of their bias, from [H, D/2, 2]."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def _find(path: Path) -> list[Path]:
    return [path] if is_gguf(path) else sorted(file for file in path.glob("*") if is_gguf(file))


def _detect(path: Path) -> Source | None:
    found = _find(path)
    if len(found) > 1:
        raise ConversionError(f"{path} has {len(found)} .gguf files: name one, such as {found[0]}")
    return Source("gguf", path, f"GGUF file {found[0]}") if found else None


def _load(source: Source, seed: int = 0, model: Iterable[str] = ()) -> Imported:
    """See ``Format.load`` and :func:`dcscale.convert.formats.transformers.read_config`."""
    files = GGUFFiles(_find(source.folder)[0])
    settings = read_settings(files)
    check_layer_count("num_hidden_layers", settings, files)
    read = read_config(settings, tied="output.weight" not in files.shapes, overrides=model)
    plan = _plan(read.config.model, settings["model_type"], read.biases, files, seed)
    notes = list(read.notes)
    if read.config.model.attention == "dcmha":
        notes.append("compose starts as the identity")
    metadata, tokenizer = files.metadata, {}
    try:
        tokenizer = {TOKENIZER: tokenizer_json(metadata), TOKENIZER_CONFIG: tokenizer_config(metadata)}
    except ValueError as error:
        notes.append(f"its tokenizer is left out: {error}")
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    # llama.cpp's default.
    if bos is not None and metadata.get(
        "tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama"
    ):
        notes.append(f"its texts begin with the token {bos}: name it with --begin-id")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return Imported(files, read.config, plan, notes, eos_id=eos, tokenizer_files=tokenizer)


FORMAT = Format(
    name="gguf",
    looks_for="one .gguf file (llama.cpp)",
    detect=_detect,
    load=_load,
    options=("seed", "model"),
)
