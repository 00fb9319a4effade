"""The training state on disk: reading ranges of it, and refusing incomplete or inconsistent states with the reason."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.training_state import TrainingStateReader, write_fragments
from dcscale.parallel import MASTER
from dcscale.testing.distributed import SHAPES, tiny_snapshot


@pytest.fixture
def folder(tmp_path):
    for rank in range(2):
        write_fragments(tiny_snapshot(rank, 2, step=3), tmp_path)
    return tmp_path


def rewrite(path, change, **metadata):
    """Rewrites the file with other tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"]) | metadata
    change(tensors)
    save_file(tensors, path, metadata={"state": json.dumps(state)})


def unchanged(tensors):
    pass


def test_any_range_is_read_from_all_files(folder):
    state = TrainingStateReader(folder)
    assert (state.ranks, state.steps, state.shapes) == (2, 3, SHAPES)
    part = torch.zeros(4)
    state.fill({("embedding.weight", MASTER): (10, part)})
    assert torch.equal(part, 3 + torch.arange(10, 14) / 1000)


DEFECTS = {
    "no tensors": (lambda t: t.clear(), "master of embedding.weight lacks elements 12 to 23"),
    "a hole": (
        lambda t: t.update({"norm.weight:exp_avg:3": t.pop("norm.weight:exp_avg:2")[1:]}),
        "exp_avg of norm.weight lacks elements 2 to 2",
    ),
    "twice": (
        lambda t: t.update({"norm.weight:master:1": torch.zeros(4)}),
        "master of norm.weight has element 1 again in rank-00001.safetensors",
    ),
    "beyond the end": (
        lambda t: t.update({"norm.weight:master:5": torch.zeros(2)}),
        "master of norm.weight has elements up to 6, but the parameter ends at 4",
    ),
    "a matrix": (
        lambda t: t.update({"norm.weight:master:2": torch.zeros(3, 1)}),
        r"norm.weight:master:2 must be a vector of F32, but has shape \[3, 1\] of F32",
    ),
    "another type": (
        lambda t: t.update({"norm.weight:master:2": torch.zeros(3).double()}),
        r"must be a vector of F32, but has shape \[3\] of F64",
    ),
    "an unknown parameter": (
        lambda t: t.update({"bias:master:0": torch.zeros(3)}),
        "bias:master:0 names no parameter and kind of the state",
    ),
    "no key": (lambda t: t.update({"bias": torch.zeros(3)}), "'bias' must be PARAMETER:KIND:START"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_missing_duplicate_and_unknown_elements_are_named(folder, defect):
    change, message = DEFECTS[defect]
    rewrite(folder / "rank-00001.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        TrainingStateReader(folder)


def test_files_that_are_not_those_of_all_ranks(folder):
    (folder / "rank-00001.safetensors").rename(folder / "rank-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"the files of 2 ranks, rank-00000\.safetensors to .*, but holds 2: "):
        TrainingStateReader(folder)
    (folder / "rank-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but holds 1: rank-00000\.safetensors"):
        TrainingStateReader(folder)
    (folder / "rank-00000.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors cannot be read: "):
        TrainingStateReader(folder)


def test_a_file_of_another_state(folder):
    rewrite(folder / "rank-00001.safetensors", unchanged, steps=4)
    with pytest.raises(CheckpointError, match=r"rank-00001.* is of another training state than rank-00000"):
        TrainingStateReader(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": 2}, "has format 2, this version of dcscale reads 1"),
        ({"parameters": []}, "has no valid metadata of a training state: AttributeError"),
        ({"ranks": "many"}, "has no valid metadata of a training state: ValueError"),
        ({"ranks": float("inf")}, "has no valid metadata of a training state: OverflowError"),
    ],
)
def test_invalid_metadata(folder, metadata, message):
    rewrite(folder / "rank-00000.safetensors", unchanged, **metadata)
    with pytest.raises(CheckpointError, match=message):
        TrainingStateReader(folder)


def test_another_model(folder):
    shapes = {"norm.weight": (6,), "output.weight": (6, 4)}
    with pytest.raises(CheckpointError, match="does not fit the model: ") as caught:
        TrainingStateReader(folder).check_shapes(shapes)
    assert str(caught.value).partition("model: ")[2].split("; ") == [
        "output.weight is missing",
        "embedding.weight is unknown to the model",
        "norm.weight has shape (5,), the model expects (6,)",
    ]
    TrainingStateReader(folder).check_shapes(SHAPES)
