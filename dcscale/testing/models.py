"""Small models and model folders for tests, and readers of golden files: outputs of the official DCFormer code.

A golden case of a model is a folder with upstream's ``config.json``, its weights ``model.safetensors``, and
``io.safetensors`` with inputs, outputs, and gradients under ``grad.<upstream name>``. The readers translate the names
to dcscale's. A golden case of attention has only results; its inputs are generated here from a seed, as they were for
the official code. Its files have upstream's axes [B, N, T, D], heads before tokens; here tokens come first.
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


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> DCFormer:
    """A model with random weights of the size that trained weights have.

    Initial weights are so small that a wrong mask or a missing compose branch would hardly change the output.
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
                # Variance 1 / fan-in keeps activations of the order of 1. dw1 and dd are stored as [inputs, ...].
                fan_in = parameter.shape[0 if name.endswith((".dw1", ".dd")) else 1]
                parameter.copy_(noise / fan_in**0.5)
    return model


def random_ids(config: ModelConfig, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids, int64 [batch, tokens]."""
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, model: ModelConfig, *, training: bool = False, shard_bytes: int = 1 << 30) -> Path:
    """Writes a dcscale model folder of :func:`random_model`; ``training`` adds an (empty) optimizer folder."""
    folder.mkdir(parents=True)
    weights = random_model(model, dtype=torch.float32).named_parameters()
    save_weights(((name, tensor.detach()) for name, tensor in weights), folder / "weights", shard_bytes)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": asdict(model)}))
    state = {"format": 1, "step": 7, "tokens": 700, "tokenizer": {"spec": "byte", "eos_id": 256}, "train_seconds": 1.0}
    (folder / "state.json").write_text(json.dumps(state))
    if training:
        (folder / "optimizer").mkdir()
    seal(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder or of an upstream folder, by name."""
    folder = folder / "weights" if (folder / "weights").is_dir() else folder
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load_tensors(model: torch.nn.Module, folder: Path) -> None:
    """Loads a model folder, which must have exactly the parameters of ``model``."""
    tensors = tensors_of(folder)
    assert tensors.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(tensors, strict=False)  # strict would require tied weights under both names


class UpstreamFolder:
    """An upstream folder whose config and tensors can be changed. Its tensors are moved to one safetensors file.

    Attributes:
        settings: content of config.json; :meth:`write` writes it.
        tensors: by name; :meth:`write` writes them.
    """

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
    """``weights`` and ``gradients`` under dcscale's names, ``values`` the other tensors under their own."""

    config: ModelConfig
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]


def load_model_case(folder: Path, *, visible_keys: int, gelu: str) -> GoldenCase:
    """Reads a case of a model. ``visible_keys`` of local layers and ``gelu`` are stated in the case's README."""
    settings = json.loads((folder / "config.json").read_text())
    read = read_upstream(settings, gelu=gelu, local_keys=visible_keys)
    return _load(folder, read.config.model, prefix="")


def load_attention_case(folder: Path) -> GoldenCase:
    """Reads a case of one attention layer of upstream's JAX code; the weights have the names of block 0."""
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
    # grad.x is the gradient of an input, not of a parameter: it stays in values.
    gradients = [name for name in values if name.startswith(_GRADIENT) and name != "grad.x"]
    # grad.x is the gradient of an input, not of a parameter: it stays in values.
    gradients = {prefix + name.removeprefix(_GRADIENT): values.pop(name) for name in gradients}
    weights = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    return GoldenCase(config, _renamed(weights, config), _renamed(gradients, config), values)


def _renamed(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Upstream's tensors under dcscale's names. ``tensors`` may be only some of a model's, or their gradients."""
    plan = plan_import(config, tensors, "original")
    rules = [rule for rule in plan.rules if tensors.keys() >= set(rule.sources)]
    return {rule.name: rule.apply(lambda name, rows: tensors[name][slice(*(rows or (None,)))]) for rule in rules}


_UPSTREAM = {"q1": "qw1", "q2": "qw2", "qg": "qdd", "k1": "kw1", "k2": "kw2", "kg": "kdd"}
_STREAMS = ["q", "k", "v", "cot"]
_WEIGHT_STREAMS = [f"{stage}.{name}" for stage in ("pre", "post") for name in ("q1", "q2", "k1", "k2", "qg", "kg")]
_FIRST_WEIGHT_STREAM = 10
_PROBE = {"seed": 424242, "stream": 99}


@dataclass
class GoldenAttention:
    """A golden case of attention.

    Attributes:
        inputs: generated.
        stored: results in float32, under the names of :meth:`AttentionInputs.run`, at the positions ``rows``.
        rows: None for all positions.
        checksums: of the float64 results, under the same names; see :func:`checksums`.
        stored_inputs: to compare ``inputs`` with; empty if only some rows are stored.
    """

    inputs: AttentionInputs
    stored: dict[str, Tensor]
    rows: list[int] | None
    checksums: dict[str, dict[str, float]]
    stored_inputs: dict[str, Tensor]


def golden_names(folder: Path) -> list[str]:
    """Names of the attention cases in a folder."""
    return [entry["name"] for entry in json.loads((folder / "index.json").read_text())]


def load_golden_attention(folder: Path, name: str) -> GoldenAttention:
    """Reads the attention case ``name`` of a folder."""
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
    for key, stored_name in stored_names.items():
        result = file[stored_name + suffix]
        # Compose weights, which have a dot in their names, have the same axes in both layouts.
        stored[key] = result if "." in key else _heads_after_tokens(result)
        if entry["rows"] is None and key != "out":
            original = file[_upstream(key)]
            stored_inputs[key] = original if "." in key else _heads_after_tokens(original)
    sums = {key: entry["checksums"][stored_name] for key, stored_name in stored_names.items()}
    return GoldenAttention(inputs, stored, entry["rows"], sums, stored_inputs)


def checksums(name: str, result: Tensor) -> dict[str, float]:
    """The three checksums in the index, of a float64 result in upstream's layout."""
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
    """A generated compose weight. ``kind``: g for gates, 1 and 2 for the low-rank factors."""
    batch, tokens, heads = shape
    if kind == "g":
        return (_fill(seed, stream, shape) / 2).clamp(-0.96875, 0.96875)
    weight = _fill(seed, stream, (batch, tokens, 2, heads))
    return weight * 2.0 ** round(float(np.log2(0.5 / np.sqrt(heads)))) if kind == "2" else weight


def _fill(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Values from about N(0, 1), multiples of 1/32 below 3.5: the sum of four bytes of a hash of the index.

    They are the same on every machine, so the golden files need not store the inputs.
    """
    with np.errstate(over="ignore"):
        bits = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(6364136223846793005)
        bits += np.uint64(seed) * np.uint64(1442695040888963407) + np.uint64(stream) * np.uint64(3935559000370003845)
        bits += np.uint64(1013904223)
        for _ in range(2):
            bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            bits ^= bits >> np.uint64(29)
    total = sum(((bits >> np.uint64(shift)) & np.uint64(255)).astype(np.float64) for shift in (8, 20, 36, 52))
    return torch.from_numpy((np.round((total - 510.0) / 147.8 * 32) / 32).reshape(shape))
