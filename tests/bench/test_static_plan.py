"""The launches of a call, what they read and write, and their times."""

from collections import Counter

import pytest
import torch

from dcscale.bench.attention.cases import Case
from dcscale.bench.attention.static.cost import Tiles, Traffic
from dcscale.bench.attention.static.operators import TorchOperators

pytest.importorskip("triton", reason="triton is not installed")

from dcscale.bench.attention.static.plan import make_call, plan, time_launches, with_room_to_keep, work_of
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import Launch, tiles_for

ARCH, LENGTH, HEADS, HEAD_DIM = 90, 256, 4, 32
CASE = Case("bf16", 1, LENGTH, HEADS, HEAD_DIM, None, 2)
TILES = tiles_for(ARCH, 2)
COARSE = TILES.product.queries * TILES.product.keys * HEADS
"""Scores of a product's tile."""
STAGED = HEADS * LENGTH**2
SEEN = STAGED * 10 // 16
"""Scores of the 64 x 64 tiles in which anything is visible; there are as many in those of 32 x 64."""
ROWS = 2 * LENGTH * HEADS * HEAD_DIM
"""Bytes of q, k or v."""
WEIGHTS = 5 * LENGTH * HEADS
"""Numbers of a compose by query, or by key: R = 2 of both factors, and a gate."""


def by_name(planned):
    return {(work.direction, work.name): work for work, _ in planned}


@pytest.fixture(scope="module")
def works():
    return by_name(plan(make_call(CASE, None), ARCH))


def test_every_launch_of_both_directions_is_planned(works):
    launches = {key: work.launches for key, work in works.items() if work.kind != "torch"}
    forward = ["scores", "compose_scores", "finish_log_sums", "compose_probabilities", "out"]
    backward = ["scores", "compose_scores", "dcomposed", "compose_probabilities_backward", "dv"]
    backward += ["compose_scores_backward", "dq", "dk"]
    expected = {("forward", name): 1 for name in forward} | {("backward", name): 1 for name in backward}
    expected |= {("backward", "sum_by_query"): 2, ("backward", "sum_by_key"): 2}
    # By query and by key, of pre and of post.
    expected |= {(direction, "pack_weights"): 4 for direction in ("forward", "backward")}
    assert launches == expected | {("backward", "unpack_gradients"): 4}
    # Sums by key start as zeros.
    zeros = works["backward", "torch operators"]
    assert (zeros.launches, zeros.traffic) == (2, Traffic(written=2 * 4 * WEIGHTS))


def test_tiles_are_counted_by_what_they_see(works):
    tile, counts = TILES.forward, Counter()
    for first in range(0, LENGTH, tile.queries):
        for key in range(0, LENGTH, tile.keys):
            last = first + tile.queries - 1
            counts["unseen" if key > last else "edge" if key + tile.keys - 1 > first else "interior"] += 1
    assert works["forward", "compose_scores"].tiles == Tiles(**counts)


def test_mixing_kernels_read_and_write_the_tiles_that_are_seen(works):
    weights = 4 * 2 * WEIGHTS
    work = works["forward", "compose_scores"]
    assert (work.kind, work.elements) == ("mix", STAGED)
    partials = 2 * 4 / TILES.forward.keys  # two float32 numbers for the keys of a tile
    of_tiles = 5 * 4 * (1 / TILES.forward.keys + 1 / TILES.forward.queries) * SEEN
    assert work.traffic == Traffic(2 * SEEN + weights, 2 * SEEN, (2 + partials) * SEEN, of_tiles - weights)
    work = works["backward", "compose_scores_backward"]
    latents = 4 * 4 / HEADS  # 2 R float32 numbers for all heads
    by_query, by_key = 4 / TILES.backward.keys, 4 / TILES.backward.queries
    assert work.traffic.read == pytest.approx((6 + latents) * SEEN + weights)
    assert work.traffic.again == pytest.approx(4 * SEEN)
    assert work.traffic.written == pytest.approx((2 + 5 * by_query + 5 * by_key) * SEEN)
    assert work.traffic.operands == pytest.approx((5 * by_query + 5 * by_key) * SEEN - weights)
    work = works["backward", "compose_probabilities_backward"]
    # Of the sums by query there is one more, for the softmax. Of the weights it reads w1 and w2 twice.
    assert work.traffic.written == pytest.approx((4 + 6 * by_query + 5 * by_key) * SEEN)
    assert work.traffic.operands == pytest.approx((9 * by_query + 9 * by_key) * SEEN - weights)


def test_what_forward_keeps_is_written_once_and_not_recomputed(works):
    kept = by_name(plan(make_call(CASE, None), ARCH, keep=True))
    assert works.keys() - kept.keys() == {("backward", "scores"), ("backward", "compose_scores")}
    assert kept.keys() < works.keys()
    latents, probabilities = 4 * 4 / HEADS * SEEN, 2 * SEEN
    for name, more in (("compose_scores", latents), ("compose_probabilities", probabilities)):
        plain, keeping = works["forward", name].traffic, kept["forward", name].traffic
        assert keeping == plain._replace(written=pytest.approx(plain.written + more))


def test_scratch_is_doubled_until_forward_can_keep():
    call = make_call(CASE, None)
    assert with_room_to_keep(call, ARCH) is call
    roomy = with_room_to_keep(call._replace(scratch_bytes=2**20), ARCH)
    assert StagedAttention(roomy, TILES).keeps
    assert not StagedAttention(roomy._replace(scratch_bytes=roomy.scratch_bytes // 2), TILES).keeps


def test_products_compute_and_move_the_tiles_that_are_seen(works):
    seen = 6  # of 2 x 4 coarse tiles
    # Of an operand, for one coarse tile.
    queries, keys = (2 * positions * HEAD_DIM * HEADS for positions in (TILES.product.queries, TILES.product.keys))
    scores = works["forward", "scores"]
    assert (scores.kind, scores.elements, scores.flops) == ("product", seen * COARSE, 2 * HEAD_DIM * seen * COARSE)
    # Of the maps, the tiles of the kernels that mix heads.
    # A program reads its queries once for all its tiles of keys.
    assert scores.traffic == Traffic(2 * ROWS, 0, 2 * SEEN, 2 * queries + seen * keys - 2 * ROWS)
    for each, operand in ((works["forward", "out"], keys), (works["backward", "dv"], queries)):
        assert each.traffic == Traffic(2 * SEEN + ROWS, 0, ROWS, seen * operand - ROWS)


def test_a_map_is_read_again_for_each_block_of_columns():
    works = by_name(plan(make_call(Case("bf16", 1, LENGTH, HEADS, 256, None, 2), None), ARCH))
    line = 2 * 256 * HEADS
    for each, positions in (
        (works["forward", "out"], TILES.product.keys),
        (works["backward", "dv"], TILES.product.queries),
    ):
        assert each.traffic.operands == 6 * positions * line - LENGTH * line + 2 * SEEN


def test_keys_before_the_first_are_not_read():
    case = Case("bf16", 1, 1024, HEADS, HEAD_DIM, 128, 2)
    call = make_call(case, None)
    (chunk,) = StagedAttention(call, TILES).forward_chunks
    assert chunk.first_key == -128
    assert by_name(plan(call, ARCH))["forward", "scores"].traffic.read == 2 * 2 * 1024 * HEADS * HEAD_DIM


def test_sums_read_what_the_tiles_that_are_seen_have_written(works):
    # One sum by query is for the softmax. Sums by key are added to what is there.
    by_query, by_key = 4 * (2 * WEIGHTS + LENGTH * HEADS), 4 * 2 * WEIGHTS
    tile = TILES.backward
    assert works["backward", "sum_by_query"].traffic == Traffic(4 * 11 / tile.keys * SEEN, written=by_query)
    assert works["backward", "sum_by_key"].traffic == Traffic(4 * 10 / tile.queries * SEEN + by_key, written=by_key)


def test_weights_and_their_gradients_change_their_layout(works):
    assert works["forward", "pack_weights"].traffic == Traffic(2 * 4 * WEIGHTS, written=4 * 4 * WEIGHTS)
    # Without the sums for the softmax.
    assert works["backward", "unpack_gradients"].traffic == Traffic(4 * 4 * WEIGHTS, written=2 * 4 * WEIGHTS)


def test_sums_over_several_chunks_are_added_in_float32():
    # Scratch for one tile of queries: the later one comes first and leaves sums of the first tile of keys.
    call = make_call(CASE, None)._replace(scratch_bytes=1)
    (dk,) = (work for work, _ in plan(call, ARCH) if work.name == "dk")
    assert dk.launches == 2
    keys = LENGTH // 2 * HEADS * HEAD_DIM
    assert dk.traffic.written == 2 * 2 * keys
    assert dk.traffic.added == 2 * 4 * keys


def test_a_head_dim_that_is_no_power_of_two_costs_what_is_computed():
    case = Case("bf16", 1, LENGTH, HEADS, 80, None, 2)
    works = {work.name: work for work, _ in plan(make_call(case, None), ARCH)}
    assert works["out"].flops == 2 * 128 * works["out"].elements


def test_float32_has_its_own_tiles():
    call = make_call(Case("fp32", 1, LENGTH, HEADS, HEAD_DIM, None, 2), None)
    (launch,) = (launch for work, launch in plan(call, ARCH) if work.name == "compose_probabilities")
    assert launch.warps == tiles_for(ARCH, 2, 4).forward.warps
    assert launch.warps != TILES.forward.warps


def test_a_kernel_that_the_model_does_not_know_is_an_error():
    def unheard_of():
        pass

    attention = StagedAttention(make_call(CASE, None), TILES)
    launch = Launch("x", unheard_of, (1, 1, 1), {}, {}, 4, 1, attention.forward_chunks[0])
    with pytest.raises(ValueError, match="what the kernel 'unheard_of' reads and writes: add it to plan.py"):
        work_of(launch, "forward", attention)


def test_scratch_is_that_of_the_device_that_is_assumed():
    small, large = (make_call(Case("bf16", 1, 4096, 32, 128, None, 2), memory) for memory in (10**9, 10**11))
    assert small.scratch_bytes < large.scratch_bytes


def test_operators_of_torch_are_noted_with_their_bytes():
    noted = []
    x, y = (torch.empty(10, 4, device="meta") for _ in range(2))
    with TorchOperators(noted.append, ignored=("bmm",)):
        x.view(40).copy_(y.reshape(40))
        x.add_(y)
        torch.cat([x, y]).to(torch.float16)
        torch.empty_like(x).zero_()
        torch.zeros_like(x)
        torch.bmm(x[None], y.T[None])
    assert noted == [
        Traffic(read=160, written=160),
        Traffic(read=320, written=160),
        Traffic(read=320, written=320),
        Traffic(read=320, written=160),
        Traffic(read=0, written=160),
        Traffic(read=0, written=160),
    ]


def test_launches_are_timed_and_added_by_kernel(works):
    launches = sum(work.launches for work in works.values() if work.kind != "torch")
    times = iter([ms for ms in (100.0, 1.0, 3.0, 2.0) for _ in range(launches)])
    found = time_launches(make_call(CASE, None), lambda run: next(times), rounds=3)
    assert next(times, None) is None
    assert found["forward", "scores"] == 2.0  # the median, without the first round
    assert found["backward", "sum_by_key"] == 4.0  # two launches
