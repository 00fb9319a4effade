"""Time tile shapes of the kernels on this machine's GPU, and print the best ones for the table in tiles.py.

Usage: python -m dcscale.ops.compose.triton.tune --heads 32 --head-dim 128 --length 4096 --window 256

Axes in names: as in staging.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import product

import torch
import triton

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import TABLE, Tile, Tiles
from dcscale.ops.compose.weights import ComposeWeights

CANDIDATES = [
    Tile(queries, keys, warps)
    for queries, keys, warps in product((16, 32, 64), (32, 64, 128), (4, 8, 16))
    if 2 <= queries * keys / (32 * warps) <= 16
]
"""Tiles with 2 to 16 elements per thread: fewer waste threads, more do not fit into a thread's registers."""


def tune(
    attention: StagedAttention,
    dout_BTHD: torch.Tensor,
    candidates: Iterable[Tile] = CANDIDATES,
    milliseconds: Callable[[Callable], float] = triton.testing.do_bench,
) -> Tiles:
    """Time every candidate for a call, forward and backward, and print the times.

    Args:
        attention: the call.
        dout_BTHD: gradient of its output.
        candidates: tiles to try. Those that need more resources than the GPU has are skipped.
        milliseconds: measures the time of a function.

    Returns:
        The fastest tile of each direction.
    """
    _, statistics_BH2T = attention.forward()
    runs = {"forward": attention.forward, "backward": lambda: attention.backward(dout_BTHD, statistics_BH2T)}
    times: dict[str, dict[Tile, float]] = {name: {} for name in runs}
    for tile in candidates:
        attention.tiles = Tiles(tile, tile)
        for name, run in runs.items():
            try:
                times[name][tile] = milliseconds(run)
                print(f"{name:8}  {tile.queries:3} x {tile.keys:3}, {tile.warps:2} warps  {times[name][tile]:9.3f} ms")
            except triton.OutOfResources as error:
                print(f"{name:8}  {tile.queries:3} x {tile.keys:3}, {tile.warps:2} warps  does not fit: {error}")
    return Tiles(*(min(by_tile, key=by_tile.__getitem__) for by_tile in times.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"batch": 1, "length": 4096, "heads": 32, "head-dim": 128, "rank": 2, "window": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning needs an NVIDIA GPU, but torch sees none")
    major, minor = torch.cuda.get_device_capability()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(options.batch, options.length, *shape, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = (normal(options.heads, options.head_dim) for _ in range(4))
    low_rank, gate = (options.rank, options.heads), (options.heads,)
    pre, post = (ComposeWeights(*(0.1 * normal(*shape) for shape in (low_rank, low_rank, gate) * 2)) for _ in range(2))
    call = Call(q, k, v, pre, post, window=options.window or None, scale=options.head_dim**-0.5)
    attention = StagedAttention(call)
    best = tune(attention, dout)
    architecture = max(key for key in TABLE if key <= 10 * major + minor)
    ranks = min(key for key in TABLE[architecture] if key >= options.rank)
    print(f"best for {torch.cuda.get_device_name()}; in tiles.py: TABLE[{architecture}][{ranks}] = {best}")


if __name__ == "__main__":
    main()
