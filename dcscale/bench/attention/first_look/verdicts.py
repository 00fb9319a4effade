"""What to decide from the rows that the steps of the first look have measured. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dcscale.bench.attention import PLAIN
from dcscale.cli import short

Row = Mapping[str, Any]

NOISE = 0.02
"""Smaller differences are none."""
MODEL_HOLDS = 0.3
"""The model's time may be off by this part: kernels.md trusts it no further."""
LEAST_SHARE = 0.75
"""Of the share that the model gives the backward mixing kernels; with less it is wrong about what is slow."""
SAME_EFFICIENCY = 0.1
"""The part by which the used issue slots may differ from the assumed ones."""
CUBLAS_GAIN = 1.2
"""cuBLAS must be faster by this factor: it knows no blocks, so it needs other maps, and copies of q, k and v."""
KEPT_GAIN = 0.05
"""The part of the time for which more scratch is worth its memory."""

BACKWARD_MIX = ("compose_probabilities_backward", "compose_scores_backward")


class Decision(NamedTuple):
    """A row of the decision table."""

    question: str
    measured: str
    decision: str
    expected: str = "-"
    """What nobody has measured here: it says whether a model or an assumption expects it."""
    change: str = "-"
    """The line of code or the setting to change."""


def decide(step: str, row: Row) -> list[Decision]:
    """The decisions of a step, or that it failed."""
    if "failed" in row:
        return [Decision(f"Step {step}", "-", f"failed: {row['failed']}")]
    return list(_DECIDE[step](row))


def table(decisions: Iterable[Decision]) -> str:
    """The decision table, as Markdown."""
    columns = ("question", "measured", "expected", "decision", "change")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(getattr(each, name) for name in columns)} |" for each in decisions)])


def _facts(row: Row) -> Iterator[Decision]:
    worst = max(row["errors"], key=lambda each: each["part_of_bound"])
    place = f"{worst['implementation']}, {worst['worst']}, {_window(worst)}"
    yield Decision("Are the results right?", f"at most {worst['part_of_bound']:.0%} of a bound ({place})", "yes")
    copied, assumed = row["copy_tb_s"], row["assumed_tb_s"]
    yield Decision(
        "How fast is memory?",
        f"{copied:.2f} TB/s (copy)",
        "the model of the rows below takes the measured rate",
        f"assumed: {assumed:g} TB/s",
        "-" if abs(copied / assumed - 1) <= NOISE else f"static/cost.py: hbm = {copied:.2f}",
    )
    timed = [each for each in row["rows"] if each["not_measured"] is None]
    plain = [each for each in timed if each["kind"] in PLAIN and each["window"] is None]
    question = "Which plain attention is the fastest?"
    if not plain:
        yield Decision(question, "none can run here", "there is no yardstick")
        return
    fastest = min(plain, key=lambda each: each["forward_backward"]["ms"])
    measured = ", ".join(f"{each['implementation']} {_both_ms(each)}" for each in plain)
    yield Decision(question, measured, f"{fastest['implementation']} is the yardstick")
    for each in timed:
        if each["kind"] not in (*PLAIN, "windowed"):
            ratio = each["forward_backward"]["ms"] / fastest["forward_backward"]["ms"]
            question = f"How far is compose from it, {_window(each)}?"
            yield Decision(question, f"{_both_ms(each)}: {ratio:.2f} x", "publish it in tools/results/README.md")


def _kernels(row: Row) -> Iterator[Decision]:
    kernels, model = row["kernels"], row["model"]
    question = "Is the share of the two backward mixing kernels what the model says?"
    share, mixed, total = _share(kernels, "ms")
    measured = f"{share:.0%}: {short(mixed)} of {_ms(total)}"
    if "failed" in model:
        yield Decision(question, measured, f"no model: {model['failed']}")
        return
    expected_share, _, expected = _share(kernels, "expected_ms")
    slow = max(kernels, key=lambda each: each["ms"] - each["expected_ms"])
    where = f"{slow['direction']} {slow['kernel']} takes {short(slow['ms'])} instead of {_ms(slow['expected_ms'])}"
    holds = share >= LEAST_SHARE * expected_share
    decision = "yes: go on" if holds else f"no: stop and re-plan; {where}"
    yield Decision(question, measured, decision, f"model: {expected_share:.0%}")
    holds = abs(total / expected - 1) <= MODEL_HOLDS
    decision = f"{'yes' if holds else 'no'}; the largest excess: {where}"
    question = f"Is the time of all kernels within {MODEL_HOLDS:.0%} of it?"
    yield Decision(question, _ms(total), decision, _model(expected))
    used = [each["efficiency"] for each in kernels if each["kernel"] in BACKWARD_MIX]
    mean, assumed = sum(used) / len(used), model["efficiency"]
    same = abs(mean / assumed - 1) <= SAME_EFFICIENCY
    yield Decision(
        "Which part of the issue slots do they use?",
        ", ".join(f"{each:.2f}" for each in used),
        "as assumed" if same else "correct the model, then read its alternatives again",
        f"assumed: {assumed:g}",
        "-" if same else f"static/cost.py: efficiency = {mean:.2f}",
    )


def _share(kernels: Sequence[Row], name: str) -> tuple[float, float, float]:
    """Of the backward mixing kernels: the part of all, their time, and the time of all."""
    mixed = sum(each[name] for each in kernels if each["kernel"] in BACKWARD_MIX)
    total = sum(each[name] for each in kernels)
    return mixed / total, mixed, total


def _products(row: Row) -> Iterator[Decision]:
    largest = max(each["queries"] for each in row["products"])
    for each in (each for each in row["products"] if each["queries"] == largest):
        triton, cublas = each["triton"], each["16 bit"]
        decision, change = "keep Triton", "-"
        if "failed" in triton:
            decision = f"failed: {triton['failed']}"
        elif "ms" in cublas and triton["ms"] >= CUBLAS_GAIN * cublas["ms"]:
            decision = f"use cuBLAS: {_ms(triton['ms'] - cublas['ms'])} less"
            change = f"staging.py: {each['kernel']} (needs maps [H, C, V] and contiguous q, k, v)"
        yield Decision(
            f"Product {each['name']}, {largest} queries: Triton or cuBLAS?",
            f"Triton {_time(triton)}, cuBLAS {_time(cublas)}, to 32 bits {_time(each['32 bit'])}",
            decision,
            _model(each.get("expected_ms")),
            change,
        )


def _tiles(row: Row) -> Iterator[Decision]:
    question, expected = "Which tiles?", "model: the first"
    now, rows = row["tiles"][0], [each for each in row["tiles"] if "failed" not in each]
    if now not in rows:
        yield Decision(question, "-", f"failed: {now['failed']}", expected)
        return
    # Candidates differ from the table in one direction, and the other one was measured for nothing.
    forward = min((each for each in rows if each["backward"] == now["backward"]), key=lambda each: each["forward_ms"])
    backward = min((each for each in rows if each["forward"] == now["forward"]), key=lambda each: each["backward_ms"])
    measured = "; ".join(
        f"{'x'.join(map(str, each['forward']))} and {'x'.join(map(str, each['backward']))}: "
        f"{short(each['forward_ms'])} + {_ms(each['backward_ms'])}"
        for each in rows
    )
    gain = 1 - (forward["forward_ms"] + backward["backward_ms"]) / (now["forward_ms"] + now["backward_ms"])
    decision, change = "keep the table", "-"
    if gain > NOISE:
        decision = f"change the table: {gain:.0%} less"
        tiles = ", ".join(f"Tile({', '.join(map(str, tile))})" for tile in (forward["forward"], backward["backward"]))
        change = f"tiles.py: TABLE[{row['arch']}][{row['ranks']}] = Tiles({tiles})"
    yield Decision(question, measured, decision, expected, change)


def _scratch(row: Row) -> Iterator[Decision]:
    question, default = "How much scratch?", next(each for each in row["scratch"] if each["default"])
    if "failed" in default:
        yield Decision(question, "-", f"failed: {default['failed']}")
        return
    rows = sorted((each for each in row["scratch"] if "failed" not in each), key=lambda each: each["mib"])
    measured = ", ".join(f"{each['mib']:,} MiB {_ms(each['ms'])}" for each in rows)
    expected = f"model, for sums of dk and dv: {', '.join(_ms(each['expected_ms']) for each in rows)}"
    enough = (1 + NOISE) * min(each["ms"] for each in rows)
    best = next(each for each in rows if each["ms"] <= enough)
    decision, change = f"keep the default of {default['mib']:,} MiB", "-"
    if default["ms"] > enough:
        decision = f"derive {best['mib']:,} MiB here: {1 - best['ms'] / default['ms']:.0%} less"
        change = f"scratch.py: MEMORY_PARTS (until then model.scratch_mib: {best['mib']})"
    yield Decision(question, measured, decision, expected, change)


def _windows(row: Row) -> Iterator[Decision]:
    for each in row["windows"]:
        gpu, host = each["gpu"], each["host"]
        decision, change = "no", "-"
        if "failed" in gpu or "failed" in host:
            decision = f"failed: {gpu.get('failed') or host['failed']}"
        elif host["ms"] > gpu["ms"]:
            decision = f"yes: it works {gpu['ms'] / host['ms']:.0%} of the time"
            change = "larger micro-batches, or CUDA graphs around the layer"
        yield Decision(
            f"{_window(each).capitalize()}, B={each['batch']}: does the GPU wait for Python?",
            f"GPU {_time(gpu)}, Python {_time(host)} for {each['launches']} launches",
            decision,
            _model(each.get("expected_ms")),
            change,
        )


def _head_dims(row: Row) -> Iterator[Decision]:
    for each in row["head_dims"]:
        question = f"D={each['head_dim']}: are products for the scores worth their memory traffic?"
        scores = [kernel for kernel in each["kernels"] if kernel["kernel"] == "scores"]
        spent, total = (sum(kernel["ms"] for kernel in some) for some in (scores, each["kernels"]))
        measured = f"{short(spent)} of {_ms(total)}"
        if "failed" in each["model"]:
            yield Decision(question, measured, f"no model: {each['model']['failed']}")
            continue
        expected = sum(kernel["expected_ms"] for kernel in scores)
        decision, change = "yes, as the model says", "-"
        if spent > (1 + MODEL_HOLDS) * expected:
            decision = f"no: they take {spent / expected:.1f} x as long; try compose_scores that makes them itself"
            change = "forward.py: compose_scores"
        yield Decision(question, measured, decision, _model(expected), change)


def _kept(row: Row) -> Iterator[Decision]:
    for each in row["kept"]:
        question = f"Activation checkpointing, {_window(each)}: keep what backward needs?"
        recomputed, kept = each["recomputed"], each["kept"]
        expected = f"model: at most {_ms(each['expected_ms'])} less" if "expected_ms" in each else "-"
        if "failed" in recomputed or "failed" in kept:
            yield Decision(question, "-", f"failed: {recomputed.get('failed') or kept['failed']}", expected)
            continue
        gain = 1 - kept["ms"] / recomputed["ms"]
        decision, change = f"no: {gain:.0%} less is not worth the memory", "-"
        if gain >= KEPT_GAIN:
            decision = f"yes: {gain:.0%} less" + (", and the default scratch does" if each["by_default"] else "")
            change = "-" if each["by_default"] else f"model.scratch_mib: {each['mib']}, where memory allows"
        measured = f"{_ms(kept['ms'])} with {each['mib']:,} MiB of scratch, else {_ms(recomputed['ms'])}"
        yield Decision(question, measured, decision, expected, change)


_DECIDE: dict[str, Callable[[Row], Iterator[Decision]]] = {
    "facts": _facts,
    "kernels": _kernels,
    "products": _products,
    "tiles": _tiles,
    "scratch": _scratch,
    "windows": _windows,
    "head_dims": _head_dims,
    "kept": _kept,
}
"""By the name of the step."""


def _ms(number: float) -> str:
    return f"{short(number)} ms"


def _time(each: Row) -> str:
    return _ms(each["ms"]) if "ms" in each else "failed"


def _both_ms(row: Row) -> str:
    return f"{short(row['forward']['ms'])} / {_ms(row['forward_backward']['ms'])}"


def _model(ms: float | None) -> str:
    return "-" if ms is None else f"model: {_ms(ms)}"


def _window(row: Row) -> str:
    return "no window" if row["window"] is None else f"window {row['window']}"
