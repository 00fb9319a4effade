"""What the first look decides, from invented figures."""

from dcscale.bench.attention.first_look.verdicts import Decision, decide, table

FAILED = {"failed": "OutOfResources: 300 of 232 KiB"}


def changed(row, name, **values):
    """The row with the first entry of a list changed."""
    first, *others = row[name]
    return {**row, name: [{**first, **values}, *others]}


def attention(name, kind, ms, window=None):
    times = {"forward": {"ms": ms / 4}, "forward_backward": {"ms": ms}}
    return {"implementation": name, "kind": kind, "window": window, "not_measured": None, **times}


FACTS = {
    "errors": [
        {"implementation": "triton", "worst": "pre.q2", "window": None, "part_of_bound": 0.31},
        {"implementation": "triton", "worst": "out", "window": 256, "part_of_bound": 0.62},
    ],
    "copy_tb_s": 2.88,
    "assumed_tb_s": 4.0,
    "rows": [
        attention("sdpa flash", "sdpa", 4.0),
        attention("sdpa cudnn", "sdpa", 2.5),
        attention("windowed", "windowed", 0.9, window=256),
        attention("triton", "triton", 15.0),
        attention("triton", "triton", 2.0, window=256),
        {"implementation": "flash-attn", "kind": "flash-attn", "window": None, "not_measured": "not installed"},
    ],
}


def test_facts_name_the_yardstick_and_the_distance_from_it():
    right, memory, plain, compose, windowed = decide("facts", FACTS)
    assert right.measured == "at most 62% of a bound (triton, out, window 256)"
    assert (memory.measured, memory.expected) == ("2.88 TB/s (copy)", "assumed: 4 TB/s")
    assert memory.change == "static/cost.py: hbm = 2.88"
    assert (plain.measured, plain.decision) == (
        "sdpa flash 1 / 4 ms, sdpa cudnn 0.625 / 2.5 ms",
        "sdpa cudnn is the yardstick",
    )
    assert (compose.question, compose.measured) == ("How far is compose from it, no window?", "3.75 / 15 ms: 6.00 x")
    assert (windowed.question, windowed.measured) == ("How far is compose from it, window 256?", "0.5 / 2 ms: 0.80 x")


def test_facts_without_plain_attention_or_with_the_assumed_memory():
    _, memory, plain = decide("facts", {**FACTS, "copy_tb_s": 4.01, "rows": FACTS["rows"][2:]})
    assert memory.change == "-"
    assert (plain.measured, plain.decision) == ("none can run here", "there is no yardstick")


def kernel(name, direction, ms, expected_ms, efficiency=None):
    row = {"kernel": name, "direction": direction, "ms": ms, "efficiency": efficiency}
    return row | {"expected_ms": expected_ms}


KERNELS = {
    "kernels": [
        kernel("compose_probabilities_backward", "backward", 1.1, 1.0, 0.6),
        kernel("compose_scores_backward", "backward", 0.9, 1.0, 0.7),
        kernel("scores", "forward", 2.5, 2.0),
        kernel("out", "forward", 1.0, 1.0),
    ],
    "model": {"efficiency": 0.65},
}


def test_kernels_that_are_as_the_model_says():
    share, total, slots = decide("kernels", KERNELS)
    assert (share.measured, share.expected, share.decision) == ("36%: 2 of 5.5 ms", "model: 40%", "yes: go on")
    assert (total.measured, total.expected) == ("5.5 ms", "model: 5 ms")
    assert total.decision == "yes; the largest excess: forward scores takes 2.5 instead of 2 ms"
    assert (slots.measured, slots.expected, slots.decision) == ("0.60, 0.70", "assumed: 0.65", "as assumed")
    assert slots.change == "-"


def test_kernels_that_refute_the_model():
    slow = [*KERNELS["kernels"][:2], kernel("scores", "forward", 8.0, 2.0), KERNELS["kernels"][3]]
    share, total, _ = decide("kernels", {**KERNELS, "kernels": slow})
    assert share.decision == "no: stop and re-plan; forward scores takes 8 instead of 2 ms"
    assert total.decision.startswith("no; the largest excess: forward scores")
    _, _, slots = decide("kernels", {**KERNELS, "model": {"efficiency": 0.9}})
    assert slots.change == "static/cost.py: efficiency = 0.65"


def test_kernels_without_a_model():
    (share,) = decide("kernels", {**KERNELS, "model": {"failed": "this is 8.0"}})
    assert (share.measured, share.decision) == ("36%: 2 of 5.5 ms", "no model: this is 8.0")


def product(name, queries, triton, cublas):
    row = {"name": name, "kernel": "multiply_map", "queries": queries, "expected_ms": 0.4}
    return row | {"triton": {"ms": triton}, "16 bit": {"ms": cublas}, "32 bit": {"ms": 0.7}}


PRODUCTS = {"products": [product("out", 512, 0.5, 0.4), product("out", 128, 9.0, 0.1), product("dv", 512, 0.47, 0.4)]}


def test_products_are_judged_at_the_largest_chunk():
    out, dv = decide("products", PRODUCTS)
    assert out.question == "Product out, 512 queries: Triton or cuBLAS?"
    assert out.measured == "Triton 0.5 ms, cuBLAS 0.4 ms, to 32 bits 0.7 ms"
    assert (out.expected, out.decision) == ("model: 0.4 ms", "use cuBLAS: 0.1 ms less")
    assert out.change.startswith("staging.py: multiply_map")
    assert (dv.decision, dv.change) == ("keep Triton", "-")


def test_products_that_fail():
    out, _ = decide("products", changed(PRODUCTS, "products", **{"16 bit": FAILED}))
    assert (out.decision, out.measured) == ("keep Triton", "Triton 0.5 ms, cuBLAS failed, to 32 bits 0.7 ms")
    out, _ = decide("products", changed(PRODUCTS, "products", triton=FAILED))
    assert (out.decision, out.change) == (f"failed: {FAILED['failed']}", "-")


def tile(forward_warps, backward, forward_ms, backward_ms):
    times = {"forward_ms": forward_ms, "backward_ms": backward_ms}
    return {"forward": [64, 64, forward_warps], "backward": backward, **times}


TILES = {
    "arch": 90,
    "ranks": 2,
    "tiles": [
        tile(4, [32, 64, 4], 1.2, 4.0),
        tile(8, [32, 64, 4], 1.0, 3.0),  # its backward pass also recomputes with the other forward tile
        tile(4, [64, 64, 8], 0.9, 3.5),
        {"forward": [64, 64, 4], "backward": [16, 64, 4], **FAILED},
    ],
}


def test_the_fastest_tiles_of_each_direction_come_into_the_table():
    (tiles,) = decide("tiles", TILES)
    assert tiles.decision == "change the table: 13% less"
    assert tiles.change == "tiles.py: TABLE[90][2] = Tiles(Tile(64, 64, 8), Tile(64, 64, 8))"
    assert tiles.measured.startswith("64x64x4 and 32x64x4: 1.2 + 4 ms; 64x64x8 and 32x64x4: 1 + 3 ms; ")
    assert tiles.expected == "model: the first"


def test_tiles_stay_if_others_are_no_faster_or_they_fail():
    (tiles,) = decide("tiles", changed(TILES, "tiles", forward_ms=1.0, backward_ms=3.55))
    assert (tiles.decision, tiles.change) == ("keep the table", "-")
    (tiles,) = decide("tiles", changed(TILES, "tiles", **FAILED))
    assert tiles.decision == f"failed: {FAILED['failed']}"


def scratch(**ms):
    """The default is 1,008 MiB."""
    rows = [
        {"mib": int(mib), "default": mib == "1008", "expected_ms": 100 / int(mib)} for mib in ("512", "1008", "2048")
    ]
    return {"scratch": [row | ({"ms": ms[f"at_{row['mib']}"]} if f"at_{row['mib']}" in ms else FAILED) for row in rows]}


def test_the_least_scratch_that_is_fast_is_derived():
    (decision,) = decide("scratch", scratch(at_512=9.0, at_1008=8.05, at_2048=8.0))
    assert (decision.decision, decision.change) == ("keep the default of 1,008 MiB", "-")
    assert decision.measured == "512 MiB 9 ms, 1,008 MiB 8.05 ms, 2,048 MiB 8 ms"
    assert decision.expected == "model, for sums of dk and dv: 0.195 ms, 0.0992 ms, 0.0488 ms"
    (decision,) = decide("scratch", scratch(at_512=6.05, at_1008=8.0, at_2048=6.0))
    assert decision.decision == "derive 512 MiB here: 24% less"
    assert decision.change == "scratch.py: MEMORY_PARTS (until then model.scratch_mib: 512)"


def test_scratch_that_does_not_fit():
    (decision,) = decide("scratch", scratch(at_512=9.0, at_1008=8.0))
    assert decision.measured == "512 MiB 9 ms, 1,008 MiB 8 ms"
    (decision,) = decide("scratch", scratch(at_512=9.0))
    assert decision.decision == f"failed: {FAILED['failed']}"


WINDOWS = {
    "windows": [
        {"batch": 1, "window": 256, "launches": 29, "gpu": {"ms": 1.0}, "host": {"ms": 2.0}, "expected_ms": 0.8},
        {"batch": 8, "window": 256, "launches": 90, "gpu": {"ms": 6.0}, "host": {"ms": 2.0}},
    ]
}


def test_a_gpu_that_waits_for_python_is_found():
    one, eight = decide("windows", WINDOWS)
    assert one.question == "Window 256, B=1: does the GPU wait for Python?"
    assert one.measured == "GPU 1 ms, Python 2 ms for 29 launches"
    assert (one.expected, one.decision) == ("model: 0.8 ms", "yes: it works 50% of the time")
    assert one.change == "larger micro-batches, or CUDA graphs around the layer"
    assert (eight.expected, eight.decision, eight.change) == ("-", "no", "-")
    for name in ("gpu", "host"):
        assert decide("windows", changed(WINDOWS, "windows", **{name: FAILED}))[0].decision.startswith("failed: OutOf")


def head_dim(scores_ms, **model):
    kernels = [kernel("scores", direction, scores_ms, 0.5) for direction in ("forward", "backward")]
    return {"head_dims": [{"head_dim": 64, "kernels": [*kernels, kernel("dq", "backward", 7.0, 7.0)], "model": model}]}


def test_scores_of_narrow_heads_may_cost_what_the_model_says():
    (decision,) = decide("head_dims", head_dim(0.6))
    assert decision.question == "D=64: are products for the scores worth their memory traffic?"
    assert (decision.measured, decision.expected) == ("1.2 of 8.2 ms", "model: 1 ms")
    assert (decision.decision, decision.change) == ("yes, as the model says", "-")
    (decision,) = decide("head_dims", head_dim(1.0))
    assert decision.decision == "no: they take 2.0 x as long; try compose_scores that makes them itself"
    assert decision.change == "forward.py: compose_scores"
    (decision,) = decide("head_dims", head_dim(1.0, failed="this is 8.0"))
    assert (decision.measured, decision.decision) == ("2 of 9 ms", "no model: this is 8.0")


def kept(ms, by_default):
    row = {"window": None, "mib": 8064, "by_default": by_default, "expected_ms": 0.7}
    return {"kept": [row | {"recomputed": {"ms": 10.0}, "kept": {"ms": ms}}]}


def test_keeping_is_worth_scratch_if_it_saves_enough():
    (decision,) = decide("kept", kept(9.0, by_default=False))
    assert decision.question == "Activation checkpointing, no window: keep what backward needs?"
    assert decision.measured == "9 ms with 8,064 MiB of scratch, else 10 ms"
    assert (decision.expected, decision.decision) == ("model: at most 0.7 ms less", "yes: 10% less")
    assert decision.change == "model.scratch_mib: 8064, where memory allows"
    (decision,) = decide("kept", kept(9.0, by_default=True))
    assert (decision.decision, decision.change) == ("yes: 10% less, and the default scratch does", "-")
    (decision,) = decide("kept", kept(9.7, by_default=False))
    assert (decision.decision, decision.change) == ("no: 3% less is not worth the memory", "-")
    for name in ("recomputed", "kept"):
        (decision,) = decide("kept", changed(kept(9.0, by_default=False), "kept", **{name: FAILED}))
        assert decision.decision == f"failed: {FAILED['failed']}"


def test_a_failed_step_is_a_row():
    assert decide("tiles", {"failed": "RuntimeError: no kernel", "seconds": 1.0}) == [
        Decision("Step tiles", "-", "failed: RuntimeError: no kernel")
    ]


def test_the_table_is_markdown():
    lines = table(
        [Decision("How?", "1 ms", "so", "model: 2 ms", "a.py: b = 1"), Decision("Why?", "-", "-")]
    ).splitlines()
    assert lines[0] == "| question | measured | expected | decision | change |"
    assert lines[2] == "| How? | 1 ms | model: 2 ms | so | a.py: b = 1 |"
    assert lines[3] == "| Why? | - | - | - | - |"
