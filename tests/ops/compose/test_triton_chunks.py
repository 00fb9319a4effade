"""How the Triton backend cuts calls into chunks: results over chunks, what they cover, launches, bytes and memory.

What is counted comes from recorded launches, without running them.
"""

import itertools

import pytest
import torch

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.scratch import derived_scratch_bytes
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import band, key_range, visible_pairs
from dcscale.testing.attention import assert_same, random_inputs

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import TABLE, ScratchSizes, Shape, Tile, log_sums_shape, tiles_for
from dcscale.testing.staged import BLOCKWISE, DEVICE, find_overflows, staged, staged_results

pytestmark = [pytest.mark.usefixtures("quick_interpreter"), pytest.mark.filterwarnings("error::RuntimeWarning")]

HEADS, HEAD_DIM, LENGTH, WINDOW = 32, 128, 4096, 256

CHUNKS = {
    "causal": {"queries": 30, "batch": 2},
    "grouped": {"queries": 30, "heads": 4, "kv_heads": 1},
    "window": {"queries": 40, "window": 12},
    "bidirectional": {"queries": 30, "causal": False},
    "bidirectional, window": {"queries": 60, "window": 9, "causal": False},
}


def check(**options):
    inputs = random_inputs(**{"batch": 1, "heads": 2, "scratch_bytes": 1, **options})
    attention = staged(inputs, tiles=BLOCKWISE)
    assert len(attention.backward_chunks) > 1
    assert_same(staged_results(attention, inputs), inputs.run("reference"), 3e-6)
    return attention.backward_chunks


@pytest.mark.parametrize("options", CHUNKS.values(), ids=CHUNKS)
def test_equals_the_reference_over_chunks(options):
    """A budget below the smallest chunk, which is one row of one product's tile of queries."""
    assert all(chunk.rows == 1 and chunk.row_queries == 16 for chunk in check(**options))


def test_equals_the_reference_over_chunks_of_several_rows():
    assert [chunk.blocks for chunk in check(queries=75, window=19, scratch_bytes=100_000)] == [2, 2, 1]


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels do not look for overflows")
@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional"])
def test_no_integer_overflows(kind):
    """A band without a limit is one of 2^30 positions."""
    find_overflows(True)
    try:
        check(**{**CHUNKS[kind], "queries": 20, "batch": 1})
    finally:
        find_overflows(False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7, 100, 300, 900])
@pytest.mark.parametrize("scratch", [1, 2**20, 2**22, 2**26])
def test_chunks_cover_all_queries_and_fit_the_budget(window, scratch, causal):
    batch, queries, keys, offset = 5, 1000, 1200, 100
    shape = Shape(batch, queries, keys, offset, *band(window, causal))
    sizes, tiles = ScratchSizes(4, 4, (2, 2), (2, 2)), tiles_for(90, 2, 4)
    for size in (sizes.forward, sizes.backward):
        chunks = shape.chunks(tiles.product, lambda chunk: size(chunk, tiles) <= scratch)  # noqa: B023 (called at once)
        covered_BT = torch.zeros(batch, queries, dtype=torch.int)
        for chunk in chunks:
            rows = slice(chunk.first_batch, chunk.first_batch + chunk.batch_rows)
            assert chunk.row_queries % tiles.product.queries == chunk.row_keys % tiles.product.keys == 0
            smallest = chunk.rows == 1 and chunk.row_queries == tiles.product.queries
            assert smallest or size(chunk, tiles) <= scratch
            for row in range(chunk.blocks):
                first = chunk.first_query + row * chunk.row_queries
                last = min(first + chunk.row_queries, queries) - 1
                covered_BT[rows, first : last + 1] += 1
                start, end = key_range(offset + first, offset + last, window, causal, keys)
                first_key = chunk.first_key + row * chunk.row_queries
                assert first_key <= start
                assert end <= first_key + chunk.row_keys
        assert (covered_BT == 1).all()
        # The first takes the most memory, so the others fit into what it frees.
        assert max(chunk.scores for chunk in chunks) == chunks[0].scores


def large_call(batch=1, window=None, scratch_bytes=None):
    """Half precision, without memory; scratch as for an 80 GiB GPU."""

    def empty(*shape):
        return torch.empty(batch, LENGTH, *shape, device="meta", dtype=torch.bfloat16)

    q, k, v = (empty(HEADS, HEAD_DIM) for _ in range(3))
    weights = ComposeWeights(*(empty(*shape) for shape in ((2, HEADS), (2, HEADS), (HEADS,)) * 2))
    if scratch_bytes is None:
        sizes = {"batch": batch, "queries": LENGTH, "keys": LENGTH, "heads": HEADS}
        scratch_bytes = derived_scratch_bytes(80 * 2**30, **sizes, window=window, element_size=2)
    return Call(q, k, v, weights, weights, window=window, scratch_bytes=scratch_bytes)


def record(call, kept=None):
    """The attention, and the launches of its forward and of its backward pass, without those that pack weights."""
    launches = []
    attention = StagedAttention(call, launch=launches.append)
    _, log_sums = attention.forward(kept)
    forward = len(launches)
    attention.backward(call.q, log_sums, kept or ())
    both = launches[:forward], launches[forward:]
    return attention, *([launch for launch in found if launch.chunk is not None] for found in both)


FORWARD = ["scores", "compose_scores", "finish_log_sums", "compose_probabilities", "out"]
BACKWARD = [
    *("scores", "compose_scores", "dcomposed", "compose_probabilities_backward", "sum_by_query", "sum_by_key", "dv"),
    *("compose_scores_backward", "sum_by_query", "sum_by_key", "dq", "dk"),
]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_chunk_takes_five_launches_forward_and_twelve_backward(window, batch):
    attention, forward, backward = record(large_call(batch, window))
    assert [launch.name for launch in forward] == FORWARD * len(attention.forward_chunks)
    assert [launch.name for launch in backward] == BACKWARD * len(attention.backward_chunks)


def test_what_is_kept_is_not_made_again():
    _, forward, backward = record(large_call(window=WINDOW), kept=[])
    assert [launch.name for launch in forward] == FORWARD
    assert [launch.name for launch in backward] == BACKWARD[2:]


def test_a_window_stages_few_scores_that_no_query_sees():
    attention = StagedAttention(large_call(window=WINDOW))
    visible = visible_pairs(LENGTH, WINDOW)
    for tile, most in ((attention.tiles.product, 1.5), (attention.tiles.forward, 1.25)):
        counts = [attention.shape.tile_counts(chunk, tile) for chunk in attention.forward_chunks]
        staged = sum(count.interior + count.edge for count in counts) * tile.queries * tile.keys
        assert 1 < staged / visible <= most


def test_tiles_are_counted_by_what_their_queries_see():
    """Against the mask itself."""
    for behind, ahead, queries, offset in itertools.product((None, 20, 70), (None, 0, 20), (100,), (0, 30)):
        shape = Shape(2, queries, 150, offset, behind, ahead)
        for chunk in shape.chunks(Tile(32, 32, 4), lambda chunk: chunk.blocks < 3):
            found = {"interior": 0, "edge": 0, "unseen": 0}
            for block, t, s in itertools.product(
                range(chunk.blocks), range(0, chunk.row_queries, 16), range(0, chunk.row_keys, 32)
            ):
                key = chunk.first_key + block * chunk.row_queries + s
                position = offset + chunk.first_query + block * chunk.row_queries + t
                distance = (position + torch.arange(16))[:, None] - (key + torch.arange(32))
                seen = ((key + torch.arange(32) >= 0) & (key + torch.arange(32) < 150)).expand(16, 32)
                seen = seen & (distance <= (1000 if behind is None else behind))
                seen = seen & (-distance <= (1000 if ahead is None else ahead))
                found["interior" if seen.all() else "edge" if seen.any() else "unseen"] += chunk.batch_rows
            assert shape.tile_counts(chunk, Tile(16, 32, 4))._asdict() == found


def test_all_batch_rows_that_fit_are_in_one_grid():
    attention, forward, _ = record(large_call(8, WINDOW, scratch_bytes=2**33))
    (chunk,) = attention.forward_chunks
    assert (chunk.batch_rows, chunk.blocks, chunk.row_queries, chunk.row_keys) == (8, 32, 128, 384)
    assert {launch.grid[2] for launch in forward} == {8 * 32}


def test_derived_scratch_fits_a_chunk_of_768_queries():
    attention = StagedAttention(large_call())
    assert max(chunk.row_queries for chunk in attention.backward_chunks) >= 768
    (windowed,) = StagedAttention(large_call(window=WINDOW)).backward_chunks
    assert windowed.blocks == LENGTH // 128


def test_incomplete_gradients_move_at_most_three_bytes_a_score():
    """The sums of dk and dv in float32, written by a chunk and read by the next, with derived scratch."""
    attention, _, backward = record(large_call())
    assert len(attention.backward_chunks) > 1
    moved = 0
    for launch in backward:
        if launch.name in ("dk", "dv"):
            of_tile = 4 * launch.constants["COARSE_S"] * HEADS * HEAD_DIM
            limits = {name: launch.arguments[name] for name in ("add_from", "add_below", "final_from")}
            for tile in range(launch.chunk.keys // launch.constants["COARSE_S"]):
                position = launch.chunk.first_key - launch.arguments["key_origin"] + tile * launch.constants["COARSE_S"]
                moved += of_tile * (limits["add_from"] <= position < limits["add_below"])
                moved += of_tile * (position < limits["final_from"])
    assert 0 < moved <= 3 * HEADS * visible_pairs(LENGTH, None)


def test_all_tiles_of_an_element_size_save_log_sums_of_one_shape():
    for element_size in (2, 4):
        shapes = {
            log_sums_shape(3, queries, 4, tiles_for(capability, rank, element_size))
            for capability, rank, queries in itertools.product(TABLE, (1, 2, 3, 4), (1000,))
        }
        assert len(shapes) == 1


def peak_bytes(function):
    """Peak memory that torch allocates while ``function`` runs, above what was allocated before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def within(call, budget, kept=None):
    """Check the memory that forward and backward allocate against the budget and what they must return.

    The kernels are not launched: they do not allocate.
    """
    attention = StagedAttention(call, launch=lambda launch: None)
    qkv = call.q.nbytes + call.k.nbytes + call.v.nbytes
    weights = sum(4 * w.numel() for w in (*call.pre, *call.post))
    log_sums = torch.zeros(log_sums_shape(*call.q.shape[:3], attention.tiles))
    forward = peak_bytes(lambda: StagedAttention(call, launch=lambda launch: None).forward(kept))
    assert forward <= budget + call.q.nbytes + weights + log_sums.nbytes
    # Gradients of q, k and v, incomplete ones of k and v; the weights and their gradients, packed and unpacked.
    budget -= sum(x.nbytes for chunk in kept or () for x in chunk)
    backward = peak_bytes(lambda: attention.backward(call.q, log_sums, kept or ()))
    assert backward <= budget + 2 * qkv + 4 * weights


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("budget", [2**22, 2**23])
def test_memory_stays_within_the_budget(budget, window):
    """All scores at once would be far larger."""
    batch, queries, heads = 2, 1024, 2
    assert 4 * batch * heads * queries**2 >= 2 * budget
    inputs = random_inputs(batch=batch, queries=queries, heads=heads, head_dim=16, window=window, scratch_bytes=budget)
    within(inputs.to(torch.float32).call(), budget)


@pytest.mark.parametrize("window", [None, 40])
def test_what_is_kept_is_within_the_budget(window):
    """The smallest budget, in MiB, with which anything is kept."""
    call = random_inputs(queries=512, heads=2, head_dim=16, window=window).to(torch.float32).call()
    budgets = [mib * 2**20 for mib in range(1, 100)]
    keeping = [budget for budget in budgets if StagedAttention(call._replace(scratch_bytes=budget)).keeps]
    assert keeping == budgets[-len(keeping) :]  # more scratch never makes it impossible
    assert budgets[0] < keeping[0] < budgets[-1]
    kept = []
    within(call._replace(scratch_bytes=keeping[0]), keeping[0], kept)
    assert kept
