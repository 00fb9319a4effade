"""The search for the best tiles, with fake times."""

import sys

import pytest
import torch

from dcscale.ops.compose.triton.tiles import TABLE, Tile
from dcscale.testing.attention import random_inputs

pytest.importorskip("triton", reason="triton is not installed")
import triton

from dcscale.ops.compose.triton import tune as module
from dcscale.ops.compose.triton.tune import CANDIDATES, main, tune
from dcscale.testing.staged import DEVICE, SMALL_TILES

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def test_the_tiles_with_the_smallest_sum_of_times_are_found(capsys):
    inputs = random_inputs(batch=1, queries=5, heads=1).to(torch.float32, DEVICE)
    fast_forward = SMALL_TILES._replace(forward=Tile(8, 16, 4))
    fast_backward = SMALL_TILES._replace(backward=Tile(16, 16, 4))
    too_large = SMALL_TILES._replace(backward=Tile(16, 16, 8))
    times = iter([1.0, 5.0, 2.0, 3.0, 0.1])

    def milliseconds(run):
        run()
        try:
            return next(times)
        except StopIteration:
            raise triton.OutOfResources(300, 200, "shared memory") from None

    best = tune(inputs.call(), inputs.cotangent, [fast_forward, fast_backward, too_large], milliseconds)
    assert best == fast_backward
    first, second, third = capsys.readouterr().out.splitlines()
    tiles = "backward   8 x  16,  4 warps  products  32 x  32,  4 warps"
    assert first == f"forward   8 x  16,  4 warps  {tiles}      1.000 +     5.000 ms"
    assert second.startswith("forward  16 x  16,  4 warps  backward  16 x  16,  4 warps")
    assert "does not fit" in third


def test_candidates_include_the_table():
    in_table = {tiles for by_rank in TABLE.values() for rank, tiles in by_rank.items() if rank != "float32"}
    assert in_table <= set(CANDIDATES)


def test_the_place_in_the_table_is_printed(monkeypatch, capsys):
    """On a GPU whose architecture and whose rank the table has no entry of its own for."""
    best = TABLE[90][4]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: torch.empty(*shape, device="meta", dtype=dtype))
    monkeypatch.setattr(module, "tune", lambda call, dout: best)
    monkeypatch.setattr(sys, "argv", ["tune", "--rank", "3"])
    main()
    assert capsys.readouterr().out == f"best for a GPU; in tiles.py: TABLE[90][4] = {best}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit):
        main()
    assert "tuning needs an NVIDIA GPU, but torch sees none" in capsys.readouterr().err
