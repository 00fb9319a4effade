"""Weights as safetensors shards."""

import json

import pytest
import torch
from torch import nn

from dcscale.checkpoint import CheckpointError, Weights, save_weights


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def read(folder):
    """What a model of this kind reads from ``folder``."""
    weights = Weights(folder, {name: parameter.shape for name, parameter in model().named_parameters()})
    return [(name, weights.read(name)) for name, _ in model().named_parameters()]


def named(module):
    return [(name, parameter.detach().clone()) for name, parameter in module.named_parameters()]


@pytest.mark.parametrize(("shard_bytes", "files"), [(1 << 30, 1), (700, 2), (1, 6)])
def test_round_trip_in_any_number_of_shards(tmp_path, shard_bytes, files):
    source = model()
    save_weights(named(source), tmp_path / "weights", shard_bytes)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == files
    index = json.loads((tmp_path / "weights" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in source.parameters())
    for (name, tensor), (wanted, parameter) in zip(read(tmp_path / "weights"), named(source), strict=True):
        assert name == wanted
        assert tensor.equal(parameter)


def test_every_mismatch_is_listed(tmp_path):
    tensors = dict(named(model()))
    tensors["extra.weight"] = torch.zeros(2)
    tensors["0.weight"] = torch.zeros(16, 9)
    del tensors["2.bias"]
    save_weights(tensors.items(), tmp_path / "weights")
    with pytest.raises(CheckpointError) as error:
        read(tmp_path / "weights")
    for part in (
        "2.bias is missing",
        "extra.weight is unknown",
        "0.weight has shape (16, 9), the model expects (16, 8)",
    ):
        assert part in str(error.value)


def test_of_many_mismatches_some_are_listed_and_the_others_counted(tmp_path):
    save_weights(((f"blocks.{n}.weight", torch.zeros(1)) for n in range(20)), tmp_path / "weights")
    with pytest.raises(CheckpointError, match="blocks.7.weight is unknown to the model; and 12 more$"):
        Weights(tmp_path / "weights", {})


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda f: (f / "model.safetensors.index.json").unlink(), "index.json cannot be read"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "index.json has a weight_map of type NoneType, expected names of files",
        ),
        (lambda f: (f / "model-00001.safetensors").unlink(), "weights in .* cannot be read"),
        (lambda f: (f / "model-00001.safetensors").write_bytes(b"junk" * 9), "weights in .* cannot be read"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"0.weight": "../x.safetensors"}}'
            ),
            "names the file '../x.safetensors', but its files must be in the same folder",
        ),
    ],
)
def test_corrupt_files(tmp_path, corrupt, message):
    save_weights(named(model()), tmp_path / "weights")
    corrupt(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "weights")
