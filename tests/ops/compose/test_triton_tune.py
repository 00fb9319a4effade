"""The search for the best tiles, with fake times."""

import sys

import pytest
import torch

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.triton.tiles import TABLE, Tile
from dcscale.testing.attention import arguments, random_inputs

pytest.importorskip("triton", reason="triton is not installed")
import triton

from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tune import CANDIDATES, main, tune


def test_the_fastest_tile_of_each_direction_is_found(capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = random_inputs(batch=1, queries=5, heads=1).to(torch.float32, device)
    attention = StagedAttention(Call(*arguments(inputs.tensors)))
    first, second, too_large = Tile(16, 32, 4), Tile(32, 32, 4), Tile(16, 64, 4)
    times = iter([3.0, 1.0, 2.0, 5.0])

    def milliseconds(run):
        run()
        if attention.tiles.forward == too_large:
            raise triton.OutOfResources(300, 200, "shared memory")
        return next(times)

    best = tune(attention, inputs.cotangent, [first, second, too_large], milliseconds)
    assert best == (second, first)
    printed = capsys.readouterr().out
    assert "forward    32 x  32,  4 warps      2.000 ms" in printed
    assert "backward   16 x  64,  4 warps  does not fit" in printed


def test_candidates_include_the_table():
    tiles = {tile for by_rank in TABLE.values() for pair in by_rank.values() for tile in pair}
    assert tiles <= set(CANDIDATES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["triton_tune"])
    with pytest.raises(SystemExit):
        main()
    assert "tuning needs an NVIDIA GPU, but torch sees none" in capsys.readouterr().err
