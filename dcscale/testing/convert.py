"""Folders to convert, for tests."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from dcscale.checkpoint import save_weights
from dcscale.checkpoint.layout import seal
from dcscale.config.schema import ModelConfig
from dcscale.testing.models import lively_model


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
