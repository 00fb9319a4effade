"""Small models for tests.

Folders to convert, for tests.

Reads what the official DCFormer and DCPythia code computed, under this project's names.

A case is a folder with upstream's ``config.json``, its weights ``model.safetensors`` and ``io.safetensors``:
inputs, outputs, and gradients under ``grad.<upstream name>``.

Reads what the official code computed for one attention layer, and makes the inputs it was given.

Upstream's heads stand before the tokens, [B, N, T, D], and so do those of the files; here they stand after them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcscale.checkpoint import save_weights
from dcscale.checkpoint.layout import seal
from dcscale.config.schema import ModelConfig
from dcscale.convert.formats.upstream import plan_import
from dcscale.convert.formats.upstream_config import read_upstream
from dcscale.models import DCFormer, initialize
from dcscale.testing.attention import AttentionInputs


def tiny_config(**changes) -> ModelConfig:
    """A model of a few thousand parameters with one local and one global layer."""
    settings = {"vocab_size": 61, "layers": 2, "dim": 32, "heads": 4, "ffn_dim": 48, "windows": [5, None], **changes}
    return ModelConfig(**settings)


def lively_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> DCFormer:
    """A model with weights as far from their beginning as training takes them.

    Fresh weights are so small that a wrong mask or a missing compose branch would change next to nothing.
    """
    model = DCFormer(config, **arguments).to(dtype)
    initialize(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif name == "embedding.weight":
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[0 if name.endswith((".dw1", ".dd")) else 1]
                parameter.copy_(noise / fan_in**0.5)
    return model


def random_ids(config: ModelConfig, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids, int64 [batch, tokens]."""
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, model: ModelConfig, *, training: bool = False, shard_bytes: int = 1 << 30) -> Path:
    """A dcscale model folder, or with ``training`` what a training checkpoint has beside it."""
    folder.mkdir(parents=True)
    weights = lively_model(model, dtype=torch.float32).named_parameters()
    save_weights(((name, tensor.detach()) for name, tensor in weights), folder / "weights", shard_bytes)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": asdict(model)}))
    state = {"format": 1, "step": 7, "tokens": 700, "tokenizer": {"spec": "byte", "eos_id": 256}, "train_seconds": 1.0}
    (folder / "state.json").write_text(json.dumps(state))
    if training:
        (folder / "deepspeed").mkdir()
    seal(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All safetensors of a model folder or of an upstream folder."""
    folder = folder / "weights" if (folder / "weights").is_dir() else folder
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load_tensors(model: torch.nn.Module, folder: Path) -> None:
    """Give every parameter of ``model`` its tensor of a model folder, which holds no others."""
    tensors = tensors_of(folder)
    assert tensors.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(tensors, strict=False)  # which wants tied weights twice otherwise


class UpstreamFolder:
    """An upstream folder, from now on in one safetensors file, whose config and tensors may be changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = json.loads((folder / "config.json").read_text())
        self.tensors = tensors_of(folder)
        for path in folder.glob("model*"):
            path.unlink()
        self.write()

    def write(self) -> Path:
        (self.folder / "config.json").write_text(json.dumps(self.settings))
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.folder


_GRADIENT = "grad."


@dataclass
class GoldenCase:
    """``weights`` and ``gradients`` by this project's names, ``values`` the other tensors by their own."""

    config: ModelConfig
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]


def load_model_case(folder: Path, *, visible_keys: int, gelu: str) -> GoldenCase:
    """A case of a whole model. ``visible_keys`` of local layers and ``gelu`` are what the case's README states."""
    settings = json.loads((folder / "config.json").read_text())
    read = read_upstream(settings, gelu=gelu, local_keys=visible_keys)
    return _load(folder, read.config.model, prefix="")


def load_attention_case(folder: Path) -> GoldenCase:
    """A case of one attention layer of upstream JAX: weights are named as those of block 0."""
    settings = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        layers=1,
        dim=settings["dim"],
        heads=settings["n_head"],
        head_dim=settings["head_dim"],
        qk_norm=settings["use_qk_norm"],
        qk_norm_eps=settings["qk_norm_eps"],
        rope_base=settings["rope_base"],
        windows=[settings["window_size"]],
    )
    return _load(folder, config, prefix="layers.0.attention.")


def _load(folder: Path, config: ModelConfig, prefix: str) -> GoldenCase:
    values = load_file(folder / "io.safetensors")
    gradients = [name for name in values if name.startswith(_GRADIENT) and name != "grad.x"]
    gradients = {prefix + name.removeprefix(_GRADIENT): values.pop(name) for name in gradients}
    weights = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    return GoldenCase(config, _renamed(weights, config), _renamed(gradients, config), values)


def _renamed(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What upstream's tensors give under this project's names; of a part of a model, or gradients, a part."""
    plan = plan_import(config, tensors, "original")
    recipes = [recipe for recipe in plan.recipes if tensors.keys() >= set(recipe.sources)]
    return {
        recipe.name: recipe.apply(lambda name, rows: tensors[name][slice(*(rows or (None,)))]) for recipe in recipes
    }


_UPSTREAM = {"q1": "qw1", "q2": "qw2", "qg": "qdd", "k1": "kw1", "k2": "kw2", "kg": "kdd"}
_STREAMS = ["q", "k", "v", "cot"]
_WEIGHT_STREAMS = [f"{stage}.{name}" for stage in ("pre", "post") for name in ("q1", "q2", "k1", "k2", "qg", "kg")]
_FIRST_WEIGHT_STREAM = 10
_PROBE = {"seed": 424242, "stream": 99}


@dataclass
class GoldenAttention:
    """``stored``: results in float32, by the names of :meth:`AttentionInputs.run`, at the positions ``rows`` or at all.
    ``checksums``: of the float64 results, by the same names; see :func:`checksums`.
    ``stored_inputs``: empty where only rows are stored."""

    inputs: AttentionInputs
    stored: dict[str, Tensor]
    rows: list[int] | None
    checksums: dict[str, dict[str, float]]
    stored_inputs: dict[str, Tensor]


def golden_names(folder: Path) -> list[str]:
    """The cases of a folder."""
    return [entry["name"] for entry in json.loads((folder / "index.json").read_text())]


def load_golden_attention(folder: Path, name: str) -> GoldenAttention:
    """The case ``name`` of a folder."""
    entry = next(e for e in json.loads((folder / "index.json").read_text()) if e["name"] == name)
    batch, heads, tokens, head_dim = (entry[axis] for axis in "BNTD")
    present = [weight for weight in _WEIGHT_STREAMS if entry[weight.split(".")[0]]]

    tensors = {}
    for stream, tensor in enumerate(_STREAMS):
        tensors[tensor] = _heads_after_tokens(_fill(entry["seed"], stream, (batch, heads, tokens, head_dim)))
    for stream, weight in enumerate(_WEIGHT_STREAMS, _FIRST_WEIGHT_STREAM):
        if weight in present:
            tensors[weight] = _weight(entry["seed"], stream, weight[-1], (batch, tokens, heads))
    inputs = AttentionInputs(tensors, tensors.pop("cot"), {"window": entry["window"]})

    file = load_file(folder / f"{name}.safetensors")
    stored_names = {"out": "o", **{tensor: f"d{_upstream(tensor)}" for tensor in ["q", "k", "v", *present]}}
    suffix = "" if entry["rows"] is None else ".rows"
    stored, stored_inputs = {}, {}
    for ours, theirs in stored_names.items():
        stored[ours] = _heads_after_tokens(file[theirs + suffix]) if "." not in ours else file[theirs + suffix]
        if entry["rows"] is None and ours != "out":
            original = file[_upstream(ours)]
            stored_inputs[ours] = _heads_after_tokens(original) if "." not in ours else original
    sums = {ours: entry["checksums"][theirs] for ours, theirs in stored_names.items()}
    return GoldenAttention(inputs, stored, entry["rows"], sums, stored_inputs)


def checksums(name: str, result: Tensor) -> dict[str, float]:
    """The three numbers that the index holds of a float64 result, computed in upstream's layout."""
    if "." not in name:
        result = result.transpose(1, 2)
    probe = _fill(_PROBE["seed"], _PROBE["stream"], tuple(result.shape))
    return {
        "sum_abs": result.abs().sum().item(),
        "probe": (result * probe).sum().item(),
        "max_abs": result.abs().max().item(),
    }


def _upstream(name: str) -> str:
    stage, _, weight = name.partition(".")
    return f"{stage}_{_UPSTREAM[weight]}" if weight else name


def _heads_after_tokens(x_BNTD: Tensor) -> Tensor:
    return x_BNTD.transpose(1, 2)


def _weight(seed: int, stream: int, kind: str, shape: tuple[int, int, int]) -> Tensor:
    batch, tokens, heads = shape
    if kind == "g":
        return (_fill(seed, stream, shape) / 2).clamp(-0.96875, 0.96875)
    weight = _fill(seed, stream, (batch, tokens, 2, heads))
    return weight * 2.0 ** round(float(np.log2(0.5 / np.sqrt(heads)))) if kind == "2" else weight


def _fill(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """About N(0, 1) in multiples of 1/32, below 3.5: a hash of the index, of which four bytes are added up."""
    with np.errstate(over="ignore"):
        bits = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(6364136223846793005)
        bits += np.uint64(seed) * np.uint64(1442695040888963407) + np.uint64(stream) * np.uint64(3935559000370003845)
        bits += np.uint64(1013904223)
        for _ in range(2):
            bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            bits ^= bits >> np.uint64(29)
    total = sum(((bits >> np.uint64(shift)) & np.uint64(255)).astype(np.float64) for shift in (8, 20, 36, 52))
    return torch.from_numpy((np.round((total - 510.0) / 147.8 * 32) / 32).reshape(shape))
