"""Makes attention-static-before.json: the static model of the Triton kernels of commit 69a2742, before issue 12.

    python tools/results/attention_static_before.py FILE.json

The compose kernels come from that commit, the model from this tree. The old code has no list of launches, so they
are recorded here: kernels by overriding the methods that launch them, cuBLAS products by replacing the functions that
call it, and torch's own operators, which move whole tensors, by a dispatch mode. Calls are added to those that FILE
holds from another version of Triton.
"""

# ruff: noqa: E402

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT, COMMIT = Path(__file__).parents[2], "69a2742"
CHECKOUT = tempfile.TemporaryDirectory()
"""Until the program ends."""
ARCHIVE = subprocess.run(["git", "-C", ROOT, "archive", COMMIT, "dcscale"], stdout=subprocess.PIPE, check=True).stdout
with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as archive:
    archive.extractall(CHECKOUT.name, filter="data")
sys.path.insert(0, CHECKOUT.name)

import dcscale.bench.attention
from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.triton import kernels, staging
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.provenance import facts

dcscale.bench.attention.__path__.append(str(ROOT / "dcscale/bench/attention"))

from dcscale.bench.attention.static.compilation import Compiler, versions
from dcscale.bench.attention.static.cost import Rates, Tiles, Traffic, Work, total
from dcscale.bench.attention.static.operators import TorchOperators
from dcscale.bench.attention.static.report import MODEL, call_result, lines

ARCH, LENGTH, RANK, STAGES = 90, 4096, 2, 3
SHAPES = ((32, 128), (32, 80), (16, 64))
CUBLAS_TILE = (128, 256)
"""Rows and columns of the result that a cuBLAS program makes (assumed): it decides how often operands are read."""
MAP_BYTES = {"pre": (4, 4), "probabilities": (4, 2), "post": (4, 2), "post backward": (4, 4), "pre backward": (8, 2)}
"""Bytes of maps that a kernel reads in each of its two sweeps, and writes, for a score: float32 scores and logits, 16
bits for probabilities, their gradients and what the products read."""
ZEROED_BYTES = {"post": 2, "post backward": 2, "pre backward": 2}
"""Bytes that it writes for a score of a tile in which nothing is visible."""


class Recorder(staging.StagedAttention):
    """Notes the launches instead of making them."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.direction = "forward"
        self.works: dict[tuple[str, str], list[Work]] = {}
        self.code: dict[tuple[str, str], tuple] = {}
        self.products: Iterator[str] = iter(())

    def note(self, name: str, kind: str, traffic: Traffic, code: tuple | None = None, **fields: Any) -> None:
        key = (self.direction, name)
        self.works.setdefault(key, []).append(Work(name, self.direction, kind, 1, traffic, **fields))
        if code is not None:
            self.code.setdefault(key, code)

    def forward_chunk(self, *arguments: Any) -> None:
        self.products = iter(("scores", "P' v"))
        super().forward_chunk(*arguments)

    def backward_chunk(self, *arguments: Any) -> None:
        self.products = iter(("scores", "dP'", "dv", "dq", "dk"))
        super().backward_chunk(*arguments)

    def launch(self, kernel, tensors, chunk, tile, x, sides, **constants) -> None:
        rows, queries, _ = chunk.sizes
        tiles_s, tiles_t = x.shape[3] // tile.keys, math.ceil(queries / tile.queries)
        window = self.window or staging._NO_WINDOW
        seen = 0
        for tile_t in range(tiles_t):
            first = chunk.queries.start + tile_t * tile.queries
            last = chunk.queries.start + min((tile_t + 1) * tile.queries, queries) - 1
            for tile_s in range(tiles_s):
                key = chunk.keys.start + tile_s * tile.keys
                seen += key <= last and key + tile.keys > first - window + 1
        seen, unseen = rows * seen, rows * (tiles_t * tiles_s - seen)
        if kernel is kernels.compose_forward:
            name = {0: "pre", 1: "probabilities", 2: "post"}[constants["STEP"]]
        else:
            name = "post backward" if constants["POST"] else "pre backward"
        scores = tile.queries * tile.keys * self.heads
        read, written = MAP_BYTES[name]
        traffic = Traffic(
            read * seen * scores,
            read * seen * scores,
            (written * seen + ZEROED_BYTES.get(name, 0) * unseen) * scores,
        )
        # Integers as staging passes them, but only divisibility by 16 counts, of row_stride.
        arguments = dict(zip((each.name for each in kernel.params), tensors)) | {"row_stride": x.shape[3]}
        arguments = {each.name: 2 for each in kernel.params} | arguments
        constants |= {"HEADS": self.heads, "QUERY_RANK": sides[0].rank, "QUERY_GATE": 1, "KEY_RANK": sides[1].rank}
        constants |= {"KEY_GATE": 1, "BLOCK_T": tile.queries, "BLOCK_S": tile.keys}
        # Its masks are no branches, so an edge costs nothing more.
        self.note(
            name,
            "mix",
            traffic,
            (kernel, arguments, constants, tile.warps),
            elements=(seen + unseen) * scores,
            tiles=Tiles(seen, 0, unseen),
        )

    def finish_statistics(self, chunk, partials, statistics) -> None:
        written = 8 * chunk.sizes[0] * self.heads * chunk.sizes[1]
        self.note("finish statistics", "sum", Traffic(4 * partials.numel(), 0, written))

    def reduce_partials(self, partials, sums, chunk, width, add) -> None:
        positions = (chunk.batch.stop - chunk.batch.start) * ((chunk.blocks - 1) * chunk.sizes[1] + width)
        written = 4 * positions * partials[0, 0].numel() // partials.shape[-1]
        self.note("reduce partials", "sum", Traffic(4 * partials.numel() + written * add, 0, written))

    def product(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """out = a b, or added to it: tensors are read once, and from L2 as often as tiles of the result need them."""
        name = next(self.products)
        count, rows, inner = a.shape
        columns = b.shape[2]
        once = [x.numel() * a.element_size() for x in (a, b)]
        out_bytes = out.numel() * out.element_size()
        by_tiles = [once[0] * math.ceil(columns / CUBLAS_TILE[1]), once[1] * math.ceil(rows / CUBLAS_TILE[0])]
        traffic = Traffic(sum(once), 0, 0 if add else out_bytes, sum(by_tiles) - sum(once), 2 * out_bytes * add)
        elements = out.numel() if name in ("scores", "dP'") else a.numel()
        self.note(name, "product", traffic, elements=elements, flops=2 * count * rows * inner * columns)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    bmm, product = torch.bmm, staging._product

    def recorded_bmm(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        recorder.product(out, a, b, False)
        return out

    torch.bmm = recorded_bmm
    staging._product = lambda out, a, b, scale=1.0, add=False: recorder.product(out, a, b, add)
    try:
        # The products are noted above.
        with TorchOperators(lambda traffic: recorder.note("torch operators", "torch", traffic), ("bmm",)):
            yield
    finally:
        torch.bmm, staging._product = bmm, product


def make_call(heads: int, head_dim: int, window: int | None, documents: bool) -> Call:
    def empty(*shape: int) -> Tensor:
        return torch.empty(1, LENGTH, *shape, dtype=torch.bfloat16, device="meta")

    weights = ComposeWeights(*(empty(*shape) for shape in 2 * ((RANK, heads), (RANK, heads), (heads,))))
    q, k, v = (empty(heads, head_dim) for _ in range(3))
    document_ids = torch.empty(1, LENGTH, dtype=torch.int32, device="meta") if documents else None
    return Call(q, k, v, weights, weights, document_ids, window, head_dim**-0.5)


def run(
    compiled: Compiler, rates: Rates, heads: int, head_dim: int, window: int | None, documents: bool = False
) -> dict[str, Any]:
    recorder = Recorder(make_call(heads, head_dim, window, documents))
    with recording(recorder):
        out, statistics = recorder.forward()
        recorder.direction = "backward"
        recorder.backward(torch.empty_like(out), statistics)
    kernels_of_call = []
    for key, works in recorder.works.items():
        binary = None
        if key in recorder.code:
            binary = compiled(*recorder.code[key], STAGES)
        kernels_of_call.append((total(works), binary))
    pairs = [sum(min(t + 1, size) for t in range(LENGTH)) for size in (window or LENGTH, LENGTH)]
    case = {"dtype": "bf16", "batch": 1, "length": LENGTH, "heads": heads, "head_dim": head_dim}
    case |= {"window": window, "rank": RANK}
    return call_result(kernels_of_call, case, ARCH, heads * pairs[0], pairs[0] / pairs[1], rates)


def main() -> None:
    (path,) = map(Path, sys.argv[1:])
    rates, compiled, made_by = Rates(), Compiler(ARCH), versions()
    earlier = json.loads(path.read_text()) if path.exists() else {"calls": [], "loops": []}
    calls, loops = earlier["calls"], earlier["loops"]
    # Section 3 of kernels.md lists the loops of code that also compares documents.
    for row in run(compiled, rates, *SHAPES[0], None, documents=True)["kernels"]:
        if "loops" in row:
            slots = [round(each, 2) for each in row["loops"]]
            loops.append({"triton": made_by["triton"], "kernel": row["kernel"], "slots": slots})
            print(loops[-1])
    for heads, head_dim in SHAPES:
        for window in (None, 256):
            call = run(compiled, rates, heads, head_dim, window)
            print(*lines(call), "", sep="\n")
            calls.append({"versions": made_by, **call})
    command = ["python", "tools/results/attention_static_before.py", *sys.argv[1:]]
    result = {"what": MODEL, **facts(command, "cpu", ("triton",)), "commit": COMMIT, "assumptions": rates.describe()}
    path.write_text(json.dumps({**result, "loops": loops, "calls": calls}, indent=1) + "\n")


if __name__ == "__main__":
    main()
