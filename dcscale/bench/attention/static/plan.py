"""From the shapes of a call to its launches, and what each reads, writes and computes.

The Triton backend is run on tensors without memory, with a function that notes launches instead of making them. What
cannot be seen from outside of a kernel, how often it reads what, is in the tables here. Of the kernels that mix heads,
log-sums, delta and documents are left out: 2 % of what they read from L2 at most. On a GPU the same launches are made
and timed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.bench.attention.cases import DTYPES, Case
from dcscale.bench.attention.static.cost import Tiles, Traffic, Work, total
from dcscale.bench.attention.static.operators import TorchOperators
from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.scratch import derived_scratch_bytes
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import Chunk, Launch, Launcher, Tile, tiles_for
from dcscale.ops.compose.weights import ComposeWeights

_SWEEPS = {
    "compose_scores": {"scores_ptr": 2},
    "compose_probabilities": {"logits_ptr": 2},
    "compose_probabilities_backward": {"probabilities_ptr": 2, "gradient_ptr": 2},
    "compose_scores_backward": {"probabilities_ptr": 2, "gradient_ptr": 2, "scores_ptr": 1, "latents_ptr": 1},
}
"""Mixing kernels by name, and how often each reads which map."""

_LOW_RANK_SWEEPS = {"compose_probabilities_backward": 2}
"""How often one reads w1 and w2, if not once. Gates are read once."""

_WRITTEN = {
    "compose_scores": {"out_ptr": None, "latents_ptr": "KEEP_LATENTS", "partials_ptr": "!PROBABILITIES"},
    "compose_probabilities": {"composed_ptr": None, "probabilities_ptr": "KEEP_PROBABILITIES"},
    "compose_probabilities_backward": dict.fromkeys(
        ("gradient_ptr", "composed_ptr", "query_partials_ptr", "key_partials_ptr")
    ),
    "compose_scores_backward": dict.fromkeys(("dscores_ptr", "query_partials_ptr", "key_partials_ptr")),
}
"""The arguments that they write, each with the constant that it takes, "!" for its opposite, or None."""

Clock = Callable[[Callable[[], None]], float]
"""Runs a function and returns how many ms it took."""


class Planned(NamedTuple):
    """A kernel in one direction of a call."""

    work: Work
    """Of all its launches."""
    launch: Launch | None
    """One of them, to compile it; None for operators of torch."""


def make_call(case: Case, memory: int | None, device: str = "meta") -> Call:
    """A call with all weights, in the scratch memory that a device of so many bytes of ``memory`` gives it."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(case.batch, case.length, *shape, dtype=DTYPES[case.dtype], device=device).normal_(std=0.1)

    rank, heads = case.rank, case.heads
    pre, post = (
        ComposeWeights(*(empty(*shape) for _ in "qk" for shape in ((rank, heads), (rank, heads), (heads,))))
        for _ in range(2)
    )
    q, k, v = (empty(heads, case.head_dim) for _ in range(3))
    scratch = derived_scratch_bytes(
        memory,
        batch=case.batch,
        queries=case.length,
        keys=case.length,
        heads=heads,
        window=case.window,
        element_size=q.element_size(),
    )
    return Call(q, k, v, pre, post, window=case.window, scale=case.head_dim**-0.5, scratch_bytes=scratch)


def with_room_to_keep(call: Call, arch: int) -> Call:
    """The call with its scratch memory doubled until forward can keep in it what backward needs."""
    while not _staged(call, arch).keeps:
        call = call._replace(scratch_bytes=2 * call.scratch_bytes)
    return call


def plan(call: Call, arch: int, keep: bool = False) -> list[Planned]:
    """The kernels of a call's forward and backward pass, in order of launch.

    Args:
        call: on the meta device.
        arch: compute capability of the GPU.
        keep: forward keeps what backward needs, as when it is made again under activation checkpointing.
    """
    works: dict[tuple, list[Work]] = {}
    launches: dict[tuple, Launch | None] = {}
    direction = "forward"

    def note(name: str, work: Work, launch: Launch | None) -> None:
        # Variants of a mixing kernel have their own code and count as several.
        key = (direction, name, str(launch.constants) if work.kind == "mix" else "")
        works.setdefault(key, []).append(work)
        launches.setdefault(key, launch)

    def note_launch(launch: Launch) -> None:
        note(launch.name, work_of(launch, direction, attention), launch)

    def note_operator(traffic: Traffic) -> None:
        note("torch operators", Work("torch operators", direction, "torch", 1, traffic), None)

    with TorchOperators(note_operator):
        attention = _staged(call, arch, note_launch)
        kept = [] if keep else None
        out, log_sums = attention.forward(kept)
        direction = "backward"
        attention = _staged(call, arch, note_launch)
        attention.backward(torch.empty_like(out), log_sums, kept or ())
    return [Planned(total(works[key]), launches[key]) for key in works]


def _staged(call: Call, arch: int, launch: Launcher = Launch.run) -> StagedAttention:
    ranks = [w.shape[2] for w in (*call.pre, *call.post) if w is not None and w.dim() == 4]
    return StagedAttention(call, tiles_for(arch, max(ranks, default=0), call.q.element_size()), launch)


def time_launches(call: Call, clock: Clock, rounds: int = 5) -> dict[tuple[str, str], float]:
    """The median time of all launches of each kernel, in ms, by direction and name.

    A round before the timed ones compiles the kernels.
    """
    found: list[Counter[tuple[str, str]]] = []
    direction = "forward"

    def launch(each: Launch) -> None:
        found[-1][direction, each.name] += clock(each.run)

    for _ in range(1 + rounds):
        found.append(Counter())
        direction = "forward"
        out, log_sums = StagedAttention(call, launch=launch).forward()
        direction = "backward"
        StagedAttention(call, launch=launch).backward(torch.ones_like(out), log_sums)
    return {key: statistics.median(times[key] for times in found[1:]) for key in found[0]}


def work_of(launch: Launch, direction: str, attention: StagedAttention) -> Work:
    """What one launch does.

    Raises:
        ValueError: the kernel is not in the tables.
    """
    name, chunk = launch.kernel.__name__, launch.chunk
    if name in _LAYOUTS:
        return Work(launch.name, direction, "layout", 1, _LAYOUTS[name](launch.arguments))
    if name in _SWEEPS:
        tile = Tile(launch.constants["BLOCK_T"], launch.constants["BLOCK_S"], launch.warps)
        tiles = Tiles(*attention.shape.tile_counts(chunk, tile))
        traffic = _mixed(launch, attention, tiles)
        return Work(launch.name, direction, "mix", 1, traffic, attention.heads * chunk.scores, tiles=tiles)
    if name in _PRODUCTS:
        tile = attention.tiles.product
        seen = Tiles(*attention.shape.tile_counts(chunk, tile)).seen * attention.heads
        elements = seen * tile.queries * tile.keys
        block, head_dim = launch.constants["BLOCK_D"], attention.head_dim
        flops = 2 * elements * math.ceil(head_dim / block) * block
        return Work(launch.name, direction, "product", 1, _PRODUCTS[name](launch, attention, seen), elements, flops)
    if name in _SUMS:
        tile = Tile(launch.constants["BLOCK_T"], launch.constants["BLOCK_S"], launch.warps)
        part = _part_seen(Tiles(*attention.shape.tile_counts(chunk, tile)))
        return Work(launch.name, direction, "sum", 1, _SUMS[name](launch, part))
    raise ValueError(f"the static model does not know what the kernel {name!r} reads and writes: add it to plan.py")


def _part_seen(tiles: Tiles) -> float:
    return tiles.seen / sum(tiles)


def _positions(chunk: Chunk, attention: StagedAttention) -> tuple[int, int]:
    """Numbers of queries and of keys of a chunk that exist, of all its batch rows."""
    queries = min(chunk.first_query + chunk.blocks * chunk.row_queries, attention.queries) - chunk.first_query
    keys = min(chunk.first_key + chunk.keys, attention.keys) - max(chunk.first_key, 0)
    return chunk.batch_rows * queries, chunk.batch_rows * keys


def _mixed(launch: Launch, attention: StagedAttention, tiles: Tiles) -> Traffic:
    name, part = launch.kernel.__name__, _part_seen(tiles)
    sizes = {argument: part * x.nbytes for argument, x in launch.arguments.items() if isinstance(x, Tensor)}
    sweeps = _SWEEPS[name]
    weights, by_tiles = _weights(launch, attention, tiles)

    def is_written(condition: str | None) -> bool:
        if condition is None:
            return True
        return launch.constants[condition.lstrip("!")] != condition.startswith("!")

    return Traffic(
        read=sum(sizes[argument] for argument in sweeps) + weights,
        again=sum((times - 1) * sizes[argument] for argument, times in sweeps.items()),
        written=sum(sizes[argument] for argument, condition in _WRITTEN[name].items() if is_written(condition)),
        operands=max(0, by_tiles - weights),
    )


def _weights(launch: Launch, attention: StagedAttention, tiles: Tiles) -> tuple[int, int]:
    """Bytes of the packed weights of a chunk, and of what all tiles read of them."""
    constants, of_head = launch.constants, 4 * attention.heads
    times = _LOW_RANK_SWEEPS.get(launch.kernel.__name__, 1)
    queries, keys = _positions(launch.chunk, attention)
    once = by_tiles = 0
    for rank, gate, positions, block in (
        (constants["QUERY_RANK"], 1, queries, constants["BLOCK_T"]),
        (constants["KEY_RANK"], constants["KEY_GATE"], keys, constants["BLOCK_S"]),
    ):
        once += of_head * (2 * rank + gate) * positions
        by_tiles += of_head * (2 * rank * times + gate) * block * tiles.seen
    return once, by_tiles


class _Product(NamedTuple):
    """Sizes of the operands and results of a product, in bytes."""

    tile: Tile
    line: int
    """A query or key of one head."""
    queries: int
    """All queries of the chunk."""
    keys: int
    """All keys of the chunk."""
    map: int
    """The tiles of the map that the kernels that mix heads write or read."""
    map_again: int
    """The same, read again for each further block of columns of a result by query or key."""

    @classmethod
    def of(cls, launch: Launch, attention: StagedAttention, seen: int) -> _Product:
        tile, chunk = attention.tiles.product, launch.chunk
        line = attention.head_dim * attention.q.element_size()
        mixed = Tile(launch.constants["BLOCK_T"], launch.constants["BLOCK_S"], 1)
        mixed_seen = Tiles(*attention.shape.tile_counts(chunk, mixed)).seen * attention.heads
        map_bytes = mixed_seen * mixed.queries * mixed.keys * launch.arguments["map_ptr"].element_size()
        queries, keys = _positions(chunk, attention)
        again = map_bytes * (math.ceil(attention.head_dim / launch.constants["BLOCK_D"]) - 1)
        return cls(tile, line, queries * attention.heads * line, keys * attention.kv_heads * line, map_bytes, again)


def _rows_traffic(launch: Launch, attention: StagedAttention, seen: int) -> Traffic:
    sizes = _Product.of(launch, attention, seen)
    read = sizes.queries + sizes.keys
    constants, programs = launch.constants, seen
    if constants["HEAD_DIM"] <= constants["BLOCK_D"]:  # a program reads its queries once for all its tiles
        wide = sizes.tile._replace(keys=constants["TILES"] * sizes.tile.keys)
        programs = Tiles(*attention.shape.tile_counts(launch.chunk, wide)).seen * attention.heads
    by_tiles = (programs * sizes.tile.queries + seen * sizes.tile.keys) * sizes.line
    return Traffic(read=read, written=sizes.map, operands=max(0, by_tiles - read))


def _map_traffic(launch: Launch, attention: StagedAttention, seen: int) -> Traffic:
    sizes = _Product.of(launch, attention, seen)
    by_tiles = seen * sizes.tile.keys * sizes.line
    operands = max(0, by_tiles - sizes.keys) + sizes.map_again
    return Traffic(sizes.map + sizes.keys, written=sizes.queries, operands=operands)


def _transposed_traffic(launch: Launch, attention: StagedAttention, seen: int) -> Traffic:
    sizes, chunk, numbers = _Product.of(launch, attention, seen), launch.chunk, launch.arguments
    by_tiles = seen * sizes.tile.queries * sizes.line
    position = chunk.first_key - numbers["key_origin"]
    written = added = 0
    of_tile = chunk.batch_rows * sizes.tile.keys * attention.kv_heads * attention.head_dim
    for start in range(position, position + chunk.keys, sizes.tile.keys):
        final = start >= numbers["final_from"]
        written += of_tile * attention.q.element_size() * final
        # float32 sums over several chunks.
        added += 4 * of_tile * ((numbers["add_from"] <= start < numbers["add_below"]) + (not final))
    operands = max(0, by_tiles - sizes.queries) + sizes.map_again
    return Traffic(sizes.map + sizes.queries, written=written, operands=operands, added=added)


_PRODUCTS = {
    "multiply_rows": _rows_traffic,
    "multiply_map": _map_traffic,
    "multiply_transposed_map": _transposed_traffic,
}


def _log_sums_traffic(launch: Launch, part: float) -> Traffic:
    chunk: Chunk = launch.chunk
    return Traffic(
        part * launch.arguments["partials_ptr"].nbytes,
        written=4 * chunk.rows * chunk.row_queries * launch.constants["HEADS"],
    )


def _by_query_traffic(launch: Launch, part: float) -> Traffic:
    chunk, constants = launch.chunk, launch.constants
    sums = 4 * chunk.rows * (chunk.row_queries // constants["BLOCK_T"]) * constants["LINE"]
    return Traffic(part * launch.arguments["partials_ptr"].nbytes, written=sums)


def _by_key_traffic(launch: Launch, part: float) -> Traffic:
    chunk, constants = launch.chunk, launch.constants
    sums = 4 * chunk.batch_rows * (chunk.keys // constants["BLOCK_S"]) * constants["LINE"]
    return Traffic(part * launch.arguments["partials_ptr"].nbytes + sums, written=sums)


_SUMS = {
    "finish_log_sums": _log_sums_traffic,
    "sum_by_query": _by_query_traffic,
    "sum_by_key": _by_key_traffic,
}


def _pack_traffic(arguments: dict[str, Any]) -> Traffic:
    read = sum(arguments[name].nbytes for name in ("w1_ptr", "w2_ptr", "gate_ptr"))
    return Traffic(read, written=arguments["packed_ptr"].nbytes)


def _unpack_traffic(arguments: dict[str, Any]) -> Traffic:
    gradients = [arguments[name] for name in ("dw1_ptr", "dw2_ptr", "dgate_ptr")]
    return Traffic(4 * sum(x.numel() for x in gradients), written=sum(x.nbytes for x in gradients))


_LAYOUTS = {"pack_weights": _pack_traffic, "unpack_gradients": _unpack_traffic}
"""Kernels that change the layout of weights or of their gradients, for calls with all weights."""
