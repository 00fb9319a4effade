"""The Triton kernels against the definition: the output and all gradients of every kind of call, over several tiles.

On a GPU if there is one, else interpreted, where a tile takes a tenth of a second: shapes and tiles are small.
"""

import itertools

import pytest
import torch

from dcscale.testing.attention import WEIGHTS, assert_same, random_inputs

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton.tiles import Tile
from dcscale.testing.staged import BLOCKWISE, DEVICE, SMALL_TILES, staged, staged_results

# numpy reports divisions by zero and invalid values by RuntimeWarning: the kernels must not compute them, even unused.
pytestmark = [pytest.mark.usefixtures("quick_interpreter"), pytest.mark.filterwarnings("error::RuntimeWarning")]

TOLERANCE = 3e-6
"""Far below the effect of a wrong formula, and above float32 rounding."""

CASES = {
    "one query": {"queries": 1, "batch": 2},
    "seven": {"queries": 7},
    "batch": {"queries": 9, "batch": 3, "heads": 1},
    "one head": {"queries": 12, "heads": 1},
    "queries in the middle": {"queries": 7, "keys": 40, "query_offset": 11},
    "first queries": {"queries": 20, "keys": 40, "query_offset": 0},
    "last queries": {"queries": 7, "keys": 40},
    "documents": {"queries": 25, "documents": 7, "batch": 2},
    "grouped": {"queries": 12, "heads": 6, "kv_heads": 2},
    "one key/value head": {"queries": 12, "kv_heads": 1, "documents": 5},
    "rank 1": {"queries": 20, "rank": 1},
    "rank 3": {"queries": 12, "rank": 3, "heads": 5, "head_dim": 7},
    "rank 4": {"queries": 12, "rank": 4},
    "wide heads": {"queries": 9, "head_dim": 130},
    "scale": {"queries": 12, "scale": 0.7},
    "window": {"queries": 40, "window": 5, "batch": 2},
    "window of one": {"queries": 20, "window": 1},
    "window beyond the start": {"queries": 9, "window": 50},
    "window of several tiles": {"queries": 50, "window": 30},
    "window, grouped": {"queries": 40, "window": 9, "heads": 4, "kv_heads": 2},
    "window, keys before the queries": {"queries": 33, "keys": 50, "window": 16},
    "window, not all weights": {"queries": 33, "window": 9, "absent": ["pre.qg", "post.k1", "post.k2", "post.kg"]},
    "documents, window, last queries": {"queries": 40, "keys": 57, "documents": 12, "window": 20},
    "bidirectional": {"queries": 30, "causal": False},
    "bidirectional, window": {"queries": 60, "window": 9, "causal": False},
    "bidirectional, window, middle": {"queries": 12, "keys": 70, "query_offset": 25, "window": 9, "causal": False},
    "bidirectional, documents": {"queries": 30, "documents": 9, "causal": False},
    "bidirectional, documents, window": {"queries": 50, "documents": 12, "window": 7, "causal": False},
    "cross, more keys than queries": {"queries": 5, "keys": 30, "causal": False},
    "cross, more queries than keys": {"queries": 30, "keys": 9, "kv_heads": 1, "causal": False},
    "cross, one key": {"queries": 5, "keys": 1, "causal": False},
}


def check(options, tiles=BLOCKWISE):
    inputs = random_inputs(**{"batch": 1, "heads": 2, **options})
    assert_same(staged_results(staged(inputs, tiles=tiles), inputs), inputs.run("reference"), TOLERANCE)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_the_reference(options):
    check(options)


@pytest.mark.parametrize(
    ("product", "options"),
    [
        (Tile(32, 32, 4), {"queries": 50}),
        (Tile(32, 32, 4), {"queries": 70, "window": 17}),
        (Tile(32, 16, 4), {"queries": 70, "window": 9, "causal": False}),
    ],
)
def test_products_of_several_blocks(product, options):
    check(options, SMALL_TILES._replace(product=product))


def test_tiles_of_a_part_of_a_block():
    tiles = SMALL_TILES._replace(forward=Tile(4, 16, 1), backward=Tile(2, 16, 1))
    check({"queries": 40, "documents": 12, "window": 20}, tiles)


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=6))[::7])
def test_any_weights_may_be_missing(present):
    """A subset in pre, its complement in post; a low-rank factor without its partner has no effect."""
    absent = [name for name, there in zip(WEIGHTS[:6], present) if not there]
    absent += [name for name, there in zip(WEIGHTS[6:], present) if there]
    inputs = random_inputs(batch=1, queries=5, heads=2, absent=absent)
    results = inputs.to(torch.float32, DEVICE).run("triton")
    assert_same({name: x.cpu() for name, x in results.items()}, inputs.run("reference"), TOLERANCE)


@pytest.mark.parametrize("absent", [WEIGHTS, WEIGHTS[:6], WEIGHTS[6:]], ids=["neither", "post alone", "pre alone"])
def test_stages_alone(absent):
    check({"queries": 9, "absent": absent})
