"""Time tile shapes of the kernels on this machine's GPU, and print the best ones for the table in tiles.py.

Usage: python -m dcscale.ops.compose.triton.tune --heads 32 --head-dim 128 --length 4096 --window 256

Axes in names: as in staging.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
import triton

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.scratch import default_scratch_bytes
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import TABLE, Tile, Tiles, column
from dcscale.ops.compose.weights import ComposeWeights

CANDIDATES = [
    *dict.fromkeys(tiles for of_gpu in TABLE.values() for rank, tiles in of_gpu.items() if rank != "float32"),
    *(
        Tiles(forward, backward, product)
        for forward in (Tile(8, 64, 1), Tile(16, 64, 2), Tile(32, 64, 8), Tile(64, 64, 4))
        for backward in (Tile(8, 64, 1), Tile(8, 64, 2), Tile(16, 64, 2), Tile(32, 64, 4))
        for product in (Tile(128, 64, 4), Tile(128, 64, 8), Tile(128, 128, 8))
    ),
]
"""The tiles in the table for 16-bit input, and others with 8 to 16 elements per thread in backward, up to 32 in
forward: fewer waste instructions, more spill."""


def tune(
    call: Call,
    dout_BTHD: torch.Tensor,
    candidates: Iterable[Tiles] = CANDIDATES,
    milliseconds: Callable[[Callable], float] = triton.testing.do_bench,
) -> Tiles:
    """Time every candidate for a call, forward and backward, and print the times.

    Args:
        call: the call.
        dout_BTHD: gradient of its output.
        candidates: tiles to try. Those that need more resources than the GPU has are skipped.
        milliseconds: measures the time of a function.

    Returns:
        The tiles with the smallest sum of both times.
    """
    times: dict[Tiles, float] = {}
    for tiles in candidates:
        attention = StagedAttention(call, tiles)
        line = f"forward {_words(tiles.forward)}  backward {_words(tiles.backward)}  products {_words(tiles.product)}"
        try:
            _, log_sums = attention.forward()
            forward = milliseconds(attention.forward)
            backward = milliseconds(lambda: attention.backward(dout_BTHD, log_sums))  # noqa: B023 (called at once)
        except triton.OutOfResources as error:
            print(f"{line}  does not fit: {error}")
            continue
        times[tiles] = forward + backward
        print(f"{line}  {forward:9.3f} + {backward:9.3f} ms")
    return min(times, key=times.__getitem__)


def _words(tile: Tile) -> str:
    return f"{tile.queries:3} x {tile.keys:3}, {tile.warps:2} warps"


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
    window = options.window or None
    scratch = default_scratch_bytes(q, k, window, causal=True)
    call = Call(q, k, v, pre, post, window=window, scale=options.head_dim**-0.5, scratch_bytes=scratch)
    best = tune(call, dout)
    architecture = max(key for key in TABLE if key <= 10 * major + minor)
    print(
        f"best for {torch.cuda.get_device_name()}; in tiles.py: TABLE[{architecture}][{column(options.rank)}] = {best}"
    )


if __name__ == "__main__":
    main()
