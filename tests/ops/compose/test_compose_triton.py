"""The Triton backend against the definition: results, gradients, memory. On a GPU if there is one, else interpreted.

The interpreter takes milliseconds for each head of each tile, so shapes are small, and tiles too if several are needed.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dcscale.ops import ComposeWeights, compose_attention
from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.triton import op, tiles
from dcscale.ops.compose.triton.tiles import MAX_RANK, Tile, Tiles, scratch_bytes
from dcscale.testing.attention import WEIGHTS, arguments, check_results, random_inputs, unfused_attention

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton import staging
from dcscale.ops.compose.triton.staging import StagedAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ONE_TILE = {
    "one query": {"queries": 1},
    "seven": {"queries": 7},
    "window": {"queries": 30, "window": 5},
    "window of one": {"queries": 9, "window": 1},
    "window beyond the start": {"queries": 9, "window": 50},
    "queries in the middle": {"queries": 7, "keys": 40, "query_offset": 11},
    "documents": {"queries": 30, "documents": 9},
    "grouped": {"queries": 12, "heads": 6, "kv_heads": 2},
    "one key/value head": {"queries": 12, "kv_heads": 1, "documents": 5},
    "one head": {"queries": 12, "heads": 1},
    "rank 1": {"queries": 12, "rank": 1},
    "rank 3": {"queries": 12, "rank": 3, "heads": 5, "head_dim": 7},
    "rank 4": {"queries": 12, "rank": 4},
    "scale": {"queries": 12, "scale": 0.7},
}
TILES = {
    "odd": {"queries": 33, "batch": 1},
    "window": {"queries": 50, "window": 5, "heads": 2, "batch": 1},
    "last queries": {"queries": 7, "keys": 40, "batch": 1},
    "documents, window, last queries": {"queries": 35, "keys": 41, "documents": 12, "window": 20, "batch": 1},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 x 16, so that short sequences have many tiles."""
    small = Tiles(Tile(16, 16, 4), Tile(16, 16, 4))
    monkeypatch.setattr(tiles, "TABLE", {capability: {MAX_RANK: small} for capability in tiles.TABLE})


def moved(inputs, device, dtype=torch.float32):
    """The inputs in this dtype on this device."""
    inputs = inputs.to(dtype)
    tensors = {name: x.to(device) for name, x in inputs.tensors.items()}
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in inputs.options.items()}
    return replace(inputs, tensors=tensors, options=options, cotangent=inputs.cotangent.to(device))


def run(inputs, dtype=torch.float32):
    return {name: x.cpu() for name, x in moved(inputs, DEVICE, dtype).run("triton").items()}


def assert_close(results, expected, tolerance=2e-6):
    """The tolerance is far below the effect of a wrong formula, and above float32 rounding."""
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.isfinite(result).all(), name
        assert (result - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-12, name


@pytest.mark.parametrize("options", ONE_TILE.values(), ids=ONE_TILE)
def test_equals_the_reference(options):
    inputs = random_inputs(**options)
    assert_close(run(inputs), inputs.run("reference"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", TILES.values(), ids=TILES)
def test_equals_the_reference_over_tiles(options):
    inputs = random_inputs(**options)
    assert_close(run(inputs), inputs.run("reference"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "options", [{"batch": 2, "queries": 20, "heads": 2}, {"batch": 1, "queries": 40, "heads": 2, "window": 9}]
)
def test_equals_the_reference_over_chunks(options):
    """A budget below the smallest chunk, which is one tile's queries of one batch row."""
    inputs = random_inputs(**options)
    inputs.options["scratch_bytes"] = 1
    assert_close(run(inputs), inputs.run("reference"))


BLOCKS = {
    "all in blocks": {"queries": 64, "window": 9, "batch": 2, "heads": 2},
    "the last on their own": {"queries": 71, "window": 12, "batch": 1, "heads": 4, "kv_heads": 2},
    "keys before the queries": {"queries": 64, "keys": 73, "window": 16, "batch": 1, "heads": 2},
    "a window of several blocks": {"queries": 128, "window": 36, "batch": 1, "heads": 2},
    "documents": {"queries": 67, "window": 14, "batch": 1, "heads": 2, "kv_heads": 1, "documents": 20},
    "not all weights": {"queries": 64, "window": 9, "batch": 1, "heads": 2, "absent": ["pre.qg", "post.k1", "post.kg"]},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "several"),
    # In one chunk too where that is cheap: interpreted, an element costs a thousand times what it does on a GPU.
    [*((name, True) for name in BLOCKS), ("keys before the queries", False), ("not all weights", False)],
)
def test_equals_the_reference_in_blocks(name, several, monkeypatch):
    """Windowed calls cut into blocks of 16 queries: all in one chunk, or two in each chunk of the backward pass."""
    monkeypatch.setattr(staging, "MIN_BLOCK_QUERIES", 16)
    monkeypatch.setattr(staging, "MAX_CHUNK_QUERIES", 16)
    chunked = []
    original = StagedAttention.chunks
    monkeypatch.setattr(StagedAttention, "chunks", lambda *a: chunked.append(original(*a)) or chunked[-1])
    options = BLOCKS[name]
    inputs = random_inputs(**options)
    keys = 16 * (1 + math.ceil((options["window"] - 1) / 16))
    inputs.options["scratch_bytes"] = 90 * options["heads"] * 16 * keys if several else 2**28
    results = run(inputs)
    of_blocks = [[chunk for chunk in chunks if chunk.blocks > 1] for chunks in chunked]
    assert all(of_blocks)
    assert any(len(chunks) > 1 for chunks in of_blocks) == several
    assert_close(results, inputs.run("reference"))


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=6))[::3])
def test_any_weights_may_be_missing(present):
    """A subset in pre, its complement in post; a low-rank factor without its partner has no effect."""
    absent = [name for name, there in zip(WEIGHTS[:6], present) if not there]
    absent += [name for name, there in zip(WEIGHTS[6:], present) if there]
    inputs = random_inputs(batch=1, queries=5, heads=2, absent=absent)
    assert_close(run(inputs), inputs.run("reference"))


@pytest.mark.parametrize("absent", [WEIGHTS, WEIGHTS[:6], WEIGHTS[6:]], ids=["neither", "post alone", "pre alone"])
def test_stages_alone(absent):
    inputs = random_inputs(batch=1, queries=9, absent=absent)
    assert_close(run(inputs), inputs.run("reference"))


@pytest.mark.parametrize(
    ("heads", "queries", "batch", "head_dim"),
    [
        *((4, 33, 2, width) for width in (16, 80)),
        (6, 31, 2, 80),
        (32, 17, 1, 80),
    ],
)
def test_error_of_every_tensor_in_float32(heads, queries, batch, head_dim, record_property):
    """Errors of the output and all 15 gradients, at most twice and three times those of plain PyTorch."""
    inputs = random_inputs(batch=batch, queries=queries, heads=heads, head_dim=head_dim)
    results, plain, truth = run(inputs), inputs.to(torch.float32).run("reference"), inputs.run("reference")
    assert len(results) == 16
    for name in truth:
        errors = [(x[name].double() - truth[name]).norm() / truth[name].norm() for x in (results, plain)]
        record_property(name, f"relative error {errors[0]:.2e}, plain PyTorch {errors[1]:.2e}")
    check_results(results, plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "queries", "head_dim"), [(4, 33, 16), (6, 31, 80)])
def test_error_of_every_tensor_in_16_bits(heads, queries, head_dim, dtype):
    inputs = random_inputs(queries=queries, heads=heads, head_dim=head_dim, kv_heads=heads // 2)
    check_results(run(inputs, dtype), inputs.to(dtype).run_function(unfused_attention), inputs.run("reference"))


def test_tensors_in_any_memory_order():
    inputs = random_inputs(queries=17, heads=2, documents=6)
    shuffled = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.tensors.items()}
    documents = inputs.options["document_ids"].long().T.contiguous().T
    other = replace(inputs.with_tensors(**shuffled), options={"document_ids": documents})
    assert not any(x.is_contiguous() for x in (*shuffled.values(), documents))
    assert_close(run(other), run(inputs), tolerance=0)
    inputs.cotangent = inputs.cotangent[:, :1].expand(-1, 17, -1, -1)
    assert_close(run(inputs), inputs.run("reference"))


@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_read_before_it_is_written(monkeypatch):
    """All memory starts as NaN. Two runs give the same bits."""
    monkeypatch.setattr(staging, "MAX_CHUNK_QUERIES", 16)
    inputs = random_inputs(batch=1, queries=37, heads=2, window=21, documents=11)
    expected = run(inputs)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(1).isnan()
        assert expected["q"].new_empty(1).isnan()
        assert_close(run(inputs), expected, tolerance=0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("small_tiles")
def test_keys_that_no_query_sees_are_not_accessed(monkeypatch):
    """Positions 0..4 are before every window, 15..19 after every query."""
    inputs = random_inputs(batch=1, queries=6, keys=20, heads=2, query_offset=9, window=5)
    expected = run(inputs)
    unseen = [*range(5), *range(15, 20)]
    poisoned = {name: x.clone() for name, x in inputs.tensors.items()}
    by_key = [name for name in poisoned if name in "kv" or "k" in name]
    for name in by_key:
        poisoned[name][:, unseen] = torch.nan
    results = run(inputs.with_tensors(**poisoned))
    assert_close(results, expected, tolerance=0)
    for name in by_key:
        assert not results[name][:, unseen].any(), name


def peak_bytes(function):
    """Peak memory that torch allocates while ``function`` runs, above what was allocated before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("queries", [512, 1024])
def test_memory_stays_within_the_budget(queries, window, monkeypatch):
    """The kernels are not launched: they do not allocate. All scores at once would be far larger than the budget."""
    budget, batch, heads, head_dim, rows = 2**20, 2, 2, 16, 5
    assert 4 * batch * heads * queries**2 > 2 * budget
    for method in ("launch", "finish_statistics", "reduce_partials"):
        monkeypatch.setattr(StagedAttention, method, lambda *arguments, **options: None)
    q, k, v, pre, post = arguments(
        random_inputs(batch=batch, queries=queries, heads=heads, head_dim=head_dim).to(torch.float32).tensors
    )
    call = Call(q, k, v, pre, post, window=window, scale=0.25, scratch_bytes=budget)
    packed = 4 * 4 * batch * heads * queries * rows
    qkv = 3 * q.nbytes
    statistics = torch.zeros(batch, heads, 2, queries)

    forward = peak_bytes(lambda: op._forward(call))
    assert forward <= budget + qkv + packed + statistics.nbytes
    backward = peak_bytes(lambda: op._backward(q, [statistics], call))
    assert backward <= budget + 2 * (2 * qkv + 2 * packed)


def test_chunks_cover_all_queries_and_fit_the_budget():
    q, k, v, pre, post = arguments(random_inputs(batch=5, queries=1000, keys=1100).to(torch.float32).tensors)
    for window, budget in itertools.product((None, 7, 100, 300, 900), (2**20, 2**22, 2**26)):
        call = Call(q, k, v, pre, post, window=window, query_offset=100, scratch_bytes=budget)
        staged = StagedAttention(call)
        for tile, gradient_rows in ((staged.tiles.forward, None), (staged.tiles.backward, (5, 5))):
            seen = torch.zeros(5, 1000)
            for chunk in staged.chunks(tile, gradient_rows):
                seen[chunk.batch, chunk.queries] += 1
                rows, queries, _ = chunk.sizes
                fits = scratch_bytes(chunk, 4, 4, 8, 4, tile, gradient_rows) <= budget
                assert fits or (rows == 1 and queries == tile.queries)
                first_stop = 100 + chunk.queries.start + queries
                assert chunk.keys.stop == first_stop
                assert chunk.keys.start <= (0 if window is None else max(0, first_stop - queries - window + 1))
                assert chunk.keys.start >= -staged.padding
            assert (seen == 1).all()


def test_a_windowed_call_has_few_chunks():
    q, k, v, pre, post = arguments(random_inputs(batch=2, queries=1000).to(torch.float32).tensors)
    staged = StagedAttention(Call(q, k, v, pre, post, window=60))
    blocks = [(chunk.blocks, chunk.queries, chunk.keys) for chunk in staged.chunks(staged.tiles.forward, None)]
    assert blocks == [(1, slice(960, 1000), slice(896, 1000)), (15, slice(0, 960), slice(-64, 64))]


def test_only_the_inputs_and_row_statistics_are_kept_for_backward():
    inputs = moved(random_inputs(batch=1, queries=12, heads=2, documents=5), DEVICE)
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        compose_attention(*arguments(leaves), **inputs.options, backend="triton")
    given = {x.data_ptr() for x in (*leaves.values(), inputs.options["document_ids"])}
    (statistics,) = [x for x in kept if x.data_ptr() not in given]
    assert statistics.shape == (1, 2, 2, 12)


def test_under_activation_checkpointing():
    inputs = moved(random_inputs(batch=1, queries=12, heads=2, window=7), DEVICE)

    def recomputed(q, k, v, pre, post, **options):
        def inner(*tensors):
            weights = ComposeWeights(*tensors[3:9]), ComposeWeights(*tensors[9:])
            return compose_attention(*tensors[:3], *weights, **options, backend="triton")

        return checkpoint(inner, q, k, v, *pre, *post, use_reentrant=False)

    assert_close(inputs.run_function(recomputed), inputs.run("triton"), tolerance=0)


def test_torch_compile_sees_one_op():
    """aot_eager traces forward and backward as Inductor does, but runs the traced graphs without compiling them."""
    absent = ["pre.kg", "post.q1", "post.q2"]
    inputs = moved(random_inputs(batch=1, queries=12, heads=2, window=7, documents=8, absent=absent), DEVICE)

    def function(q, k, v, pre, post, **options):
        return 2 * compose_attention(q, k, v, pre, post, **options, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(inputs.run_function(compiled), inputs.run_function(function), tolerance=0)


@pytest.mark.parametrize("absent", [[], WEIGHTS[3:]])
def test_the_op_passes_opcheck(absent):
    """Schema, fake implementation, and autograd through the dispatcher."""
    inputs = moved(random_inputs(batch=1, queries=5, heads=2, absent=absent), DEVICE)
    weights = [inputs.tensors.get(name) for name in WEIGHTS]
    tensors = [None if x is None else x.requires_grad_() for x in (*(inputs.tensors[n] for n in "qkv"), *weights)]
    torch.library.opcheck(torch.ops.dcscale.compose_triton.default, (*tensors, None, 3, 0.5, 0, 2**28))
