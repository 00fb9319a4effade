"""The steps of the first look: what each measures, in turn until the time is up.

Axes in names: T queries, S keys, H heads, D head width, C queries of a chunk.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from dcscale.bench.attention import PLAIN
from dcscale.bench.attention.cases import DTYPES, Case, Row
from dcscale.bench.attention.first_look.verdicts import Decision, decide, table
from dcscale.bench.attention.measure import WrongResultsError, run_all
from dcscale.bench.attention.static.compilation import Compiler
from dcscale.bench.attention.static.cost import Rates, cost
from dcscale.bench.attention.static.plan import Clock, make_call, plan, time_launches, with_room_to_keep, work_of
from dcscale.bench.attention.static.report import add_measured, lines
from dcscale.bench.attention.static.tool import MODELLED_ARCH, model_case
from dcscale.bench.meter import Name, Run, first_line, gpu_clock, time_in_turns
from dcscale.ops import choose_backend
from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.triton.staging import Kept, StagedAttention
from dcscale.ops.compose.triton.tiles import MAX_RANK, Launch, Launcher, Tile, Tiles, tiles_for
from dcscale.testing.attention import arguments

MIB = 2**20
CASE = Case("bf16", 1, 4096, 32, 128, None, 2)
FORWARD_TILES = (Tile(8, 64, 1), Tile(16, 64, 2), Tile(64, 64, 4))
BACKWARD_TILES = (Tile(16, 64, 2), Tile(8, 64, 2), Tile(32, 64, 4))
"""To compare with those of the table."""
PRODUCTS = {"dcomposed": "multiply_rows", "out": "multiply_map", "dv": "multiply_transposed_map"}
"""A product of each kernel; scores, dq and dk are like them."""
RECOMPUTED = ("scores", "compose_scores")
"""Kernels of the backward pass that are not needed if forward has kept what they compute."""
_FLUSH_MS, _MOST_FLUSHES = 0.05, 500
"""Of an L2 flush, at least; and how many of them the GPU's queue takes next to a call's launches."""


@dataclass
class Look:
    """What all steps need; tests replace what needs a GPU."""

    say: Callable[[str], Any]
    deadline: float
    """A time of :func:`time.monotonic` after which nothing starts."""
    arch: int
    """Compute capability, 10 * major + minor."""
    memory: int | None
    """Of the device, in bytes; None for a CPU."""
    compiler: Compiler
    clock: Clock
    case: Case = CASE
    window: int = 256
    batches: tuple[int, ...] = (1, 8)
    chunk_queries: tuple[int, ...] = (128, 256, 512)
    scratch_mib: tuple[int, ...] = (256, 1024, 2048)
    head_dims: tuple[int, ...] = (64, 80)
    copy_bytes: int = 2**30
    seconds: float = 1.0
    """To spend on each comparison."""
    backend: str = "triton"
    device: str = "cuda"
    launch: Launcher = Launch.run
    time_in_turns: Callable[..., tuple[dict[Name, list[float]], dict[Name, str]]] = time_in_turns
    synchronize: Run = torch.cuda.synchronize
    rates: Rates = field(default_factory=Rates)
    """Of the model; measured ones take the place of assumed ones."""

    @classmethod
    def at_gpu(cls, minutes: float, say: Callable[[str], Any]) -> Look:
        """On the current GPU."""
        major, minor = torch.cuda.get_device_capability()
        arch, memory = 10 * major + minor, torch.cuda.get_device_properties().total_memory
        return cls(say, time.monotonic() + 60 * minutes, arch, memory, Compiler(arch), gpu_clock())

    def call(self, case: Case) -> Call:
        """A call with the scratch of a run."""
        return make_call(case, self.memory, self.device)

    def step(self, call: Call, tiles: Tiles | None = None) -> Run:
        """A forward and backward pass."""

        def run() -> None:
            _, log_sums = StagedAttention(call, tiles, self.launch).forward()
            StagedAttention(call, tiles, self.launch).backward(call.v, log_sums)

        return run

    def times(self, runs: Mapping[Name, Run], device: str | None = None, flushes: int = 1) -> dict[Name, Row]:
        """By name {"ms": the median}, or {"failed": why there is none}."""
        found: dict[Name, Row] = {}
        for name, run in runs.items():
            if time.monotonic() >= self.deadline:
                found[name] = {"failed": "the time limit was reached (--minutes)"}
                continue
            try:
                run()  # compiles
            except Exception as error:  # a kernel that fails to compile or launch can raise anything
                found[name] = {"failed": first_line(error)}
        ready = {name: run for name, run in runs.items() if name not in found}
        times, failures = self.time_in_turns(ready, device or self.device, self.seconds, self.deadline, flushes)
        found |= {name: {"ms": statistics.median(each)} for name, each in times.items()}
        return found | {name: {"failed": problem} for name, problem in failures.items()}

    @property
    def models(self) -> bool:
        """Whether the static model has rates for this GPU."""
        return self.arch == MODELLED_ARCH

    def model(self, case: Case) -> Row:
        """The static model of a case on this GPU."""
        rates = self.rates if self.memory is None else replace(self.rates, memory=self.memory / 1e9)
        return model_case(case, self.compiler, rates)

    def modelled_ms(self, case: Case) -> Row:
        """{"expected_ms": of a forward and backward pass}, if the model has rates for this GPU."""
        if not self.models:
            return {}
        model = self.model(case)
        return {"expected_ms": model["sums"]["both"]["ps"] * model["visible"] * 1e-9}


def facts(look: Look) -> Row:
    """Correctness, clocks, compose and all plain attention that is there, and the rate of memory.

    Raises:
        WrongResultsError: of compose attention.
    """
    q, _, _, pre, post = arguments(look.case.for_checks().draw(look.device).to(DTYPES[look.case.dtype]).tensors)
    try:
        choose_backend(look.backend, q, pre, post)
    except ValueError as error:
        raise WrongResultsError(str(error)) from error
    source = torch.empty(look.copy_bytes, dtype=torch.int8, device=look.device)
    target = torch.empty_like(source)
    copied = 2 * look.copy_bytes / look.times({"copy": lambda: target.copy_(source)})["copy"]["ms"] * 1e-9
    assumed, look.rates = look.rates.hbm, replace(look.rates, hbm=copied)
    cases = [look.case, replace(look.case, window=look.window)]
    kinds = dict.fromkeys((look.backend, *PLAIN, "windowed"))
    minutes = (look.deadline - time.monotonic()) / 60
    errors, rows = run_all(cases, lambda case: kinds, look.device, look.seconds, minutes, look.say)
    gpu = ask_nvidia_smi()
    look.say(", ".join(f"{name} {value}" for name, value in gpu.items()))
    return {"errors": errors, "rows": rows, "copy_tb_s": copied, "assumed_tb_s": assumed, "gpu": gpu}


def ask_nvidia_smi() -> Row:
    """Clocks, power and temperature of the first GPU after some work, or {"failed": why they are not known}."""
    names = ("name", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    if shutil.which("nvidia-smi") is None:
        return {"failed": "nvidia-smi is not installed"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return dict(zip(names, answer.splitlines()[0].split(", "), strict=True))
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"failed": first_line(error)}


def kernels(look: Look) -> Row:
    """Every kernel alone, next to the model."""
    return _kernels(look, look.case)


def _kernels(look: Look, case: Case) -> Row:
    measured = time_launches(look.call(case), look.clock)
    rows = [{"direction": direction, "kernel": name, "ms": ms} for (direction, name), ms in measured.items()]
    if not look.models:
        problem = f"its rates are for compute capability {MODELLED_ARCH / 10}, and this is {look.arch / 10}"
        return {"kernels": rows, "model": {"failed": problem}}
    try:
        result = look.model(case)
    except Exception as error:  # the measured times count without it
        return {"kernels": rows, "model": {"failed": first_line(error)}}
    add_measured(result, measured, look.rates)
    look.say("\n".join(lines(result)))
    modelled = {(each["direction"], each["kernel"]): each for each in result["kernels"]}
    for row in rows:
        of_model = modelled[row["direction"], row["kernel"]]
        row["expected_ms"] = of_model["ps"] * result["visible"] * 1e-9
        row |= {name: of_model[name] for name in ("efficiency", "bound", "launches", "slots_in_all")}
    return {"kernels": rows, "model": {"efficiency": look.rates.efficiency, "rates": look.rates.describe()}}


def products(look: Look) -> Row:
    """The products of a chunk of C queries by Triton, and by cuBLAS on contiguous copies."""
    call, rows = look.call(look.case), []
    for queries in look.chunk_queries:
        chunk, launches = last_queries(call, queries), {}

        def record(launch: Launch, launches: dict[str, Launch] = launches) -> None:
            look.launch(launch)  # for values as in a run
            launches[launch.name] = launch

        attention = StagedAttention(chunk, launch=record)
        out, log_sums = attention.forward()
        attention.backward(out, log_sums)
        runs = {
            (name, kind): run
            for name in PRODUCTS
            for kind, run in [
                ("triton", lambda launch=launches[name]: look.launch(launch)),
                *_cublas(name, chunk).items(),
            ]
        }
        times = look.times(runs)
        for name, kernel in PRODUCTS.items():
            row = {"name": name, "kernel": kernel, "queries": queries}
            row |= {kind: times[name, kind] for kind in ("triton", "16 bit", "32 bit")}
            if look.models:
                work = work_of(launches[name], "forward", attention)
                row["expected_ms"] = cost(work, 1, look.rates, {}, 1.0).ps * 1e-9
            rows.append(row)
    return {"products": rows}


def last_queries(call: Call, queries: int) -> Call:
    """The call of the last C queries, in one chunk."""
    pre, post = (
        weights._replace(**{name: getattr(weights, name)[:, -queries:] for name in ("q1", "q2", "qg")})
        for weights in (call.pre, call.post)
    )
    offset = call.k.shape[1] - queries
    return call._replace(q=call.q[:, -queries:], pre=pre, post=post, query_offset=offset, scratch_bytes=2**60)


def _cublas(name: str, call: Call) -> dict[str, Run]:
    """The same product of one sequence by cuBLAS, to 16 and to 32 bits: by key, these are added to float32 sums."""
    q_HCD, k_HSD = (x[0].transpose(0, 1).contiguous() for x in (call.q, call.k))
    map_HCS = torch.bmm(q_HCD, k_HSD.mT)
    a, b = {"dcomposed": (q_HCD, k_HSD.mT), "out": (map_HCS, k_HSD), "dv": (map_HCS.mT, q_HCD)}[name]
    if name == "dv":
        sums_HSD = torch.zeros_like(k_HSD, dtype=torch.float32)
        wide = partial(torch.baddbmm, sums_HSD, a, b, out_dtype=torch.float32)
    else:
        wide = partial(torch.bmm, a, b, out_dtype=torch.float32)
    return {"16 bit": partial(torch.bmm, a, b), "32 bit": wide}


def tiles(look: Look) -> Row:
    """Both directions with the tiles of the table, and with other candidates."""
    call, table_tiles = look.call(look.case), tiles_for(look.arch, look.case.rank)
    candidates = [table_tiles]
    candidates += [table_tiles._replace(forward=tile) for tile in FORWARD_TILES if tile != table_tiles.forward]
    candidates += [table_tiles._replace(backward=tile) for tile in BACKWARD_TILES if tile != table_tiles.backward]
    runs = {}
    for i, each in enumerate(candidates):
        runs[i, "forward"] = lambda each=each: StagedAttention(call, each, look.launch).forward()
        runs[i, "both"] = look.step(call, each)
    times, rows = look.times(runs), []
    for i, each in enumerate(candidates):
        forward, both = times[i, "forward"], times[i, "both"]
        row = {"forward": each.forward, "backward": each.backward, **forward, **both}
        if "failed" not in row:
            row |= {"forward_ms": forward["ms"], "backward_ms": row.pop("ms") - forward["ms"]}
        rows.append(row)
    ranks = min(rank for rank in (2, MAX_RANK) if rank >= look.case.rank)
    return {"tiles": rows, "arch": look.arch, "ranks": ranks}


def scratch(look: Look) -> Row:
    """A forward and backward pass by the scratch memory that it may use."""
    call = look.call(look.case)
    default = call.scratch_bytes // MIB
    sizes = sorted({*look.scratch_mib, default})
    times = look.times({mib: look.step(call._replace(scratch_bytes=mib * MIB)) for mib in sizes})
    rows = []
    for mib in sizes:
        added, launches = _added_and_launches(look, look.case, mib * MIB)
        row = {"mib": mib, "default": mib == default, "launches": launches, **times[mib]}
        rows.append(row | {"expected_ms": added / look.rates.hbm * 1e-9})
    return {"scratch": rows}


def _added_and_launches(look: Look, case: Case, scratch_bytes: int | None = None) -> tuple[float, int]:
    """By the launches of a call: bytes of the float32 sums of dk and dv, and how many launches there are."""
    call = make_call(case, look.memory)
    works = [work for work, _ in plan(call._replace(scratch_bytes=scratch_bytes or call.scratch_bytes), look.arch)]
    return sum(work.traffic.added for work in works), sum(work.launches for work in works if work.kind != "torch")


def windows(look: Look) -> Row:
    """With a window: the time of the GPU's work alone, and that of Python to launch it."""
    rows = []
    for batch in look.batches:
        case = replace(look.case, batch=batch, window=look.window)
        step = look.step(look.call(case))
        _, launches = _added_and_launches(look, case)
        # The GPU's queue is empty before each call, so that Python never waits for a place in it.
        host = look.times({"empty the queue": look.synchronize, "host": step}, device="cpu")["host"]
        flushes = min(_MOST_FLUSHES, math.ceil(2 * host.get("ms", 0) / _FLUSH_MS))
        gpu = look.times({"gpu": step}, flushes=flushes)["gpu"]
        row = {"batch": batch, "window": look.window, "launches": launches, "host": host, "gpu": gpu}
        rows.append(row | look.modelled_ms(case))
    return {"windows": rows}


def head_dims(look: Look) -> Row:
    """Every kernel alone, for narrow heads."""
    rows = [{"head_dim": each, **_kernels(look, replace(look.case, head_dim=each))} for each in look.head_dims]
    return {"head_dims": rows}


def kept(look: Look) -> Row:
    """Activation checkpointing: forward, forward again and backward, which finds what was kept or computes it again."""
    rows = []
    for window in (None, look.window):
        case = replace(look.case, window=window)
        call = look.call(case)
        enough = with_room_to_keep(call, look.arch)
        runs = {"recomputed": _checkpointed(look, call, False), "kept": _checkpointed(look, enough, True)}
        row = {"window": window, "mib": enough.scratch_bytes // MIB, "by_default": enough is call}
        row |= look.times(runs)
        if look.models:
            model = look.model(case)
            again = (each for each in model["kernels"] if each["direction"] == "backward")
            ps = sum(each["ps"] for each in again if each["kernel"] in RECOMPUTED)
            row["expected_ms"] = ps * model["visible"] * 1e-9
        rows.append(row)
    return {"kept": rows}


def _checkpointed(look: Look, call: Call, keep: bool) -> Run:
    def run() -> None:
        StagedAttention(call, launch=look.launch).forward()
        found: list[Kept] | None = [] if keep else None
        _, log_sums = StagedAttention(call, launch=look.launch).forward(found)
        StagedAttention(call, launch=look.launch).backward(call.v, log_sums, found or ())

    return run


STEPS = {step.__name__: step for step in (facts, kernels, products, tiles, scratch, windows, head_dims, kept)}


def take(look: Look, save: Callable[[Row], None], steps: Mapping[str, Callable[[Look], Row]] = STEPS) -> int:
    """Take all steps, each of which may fail, and print the decisions.

    Args:
        look: what the steps need.
        save: receives all that is known after each step.
        steps: by name.

    Returns:
        The exit code: 1 if compose attention gives wrong results, with which nothing is measured.
    """
    rows: Row = {}
    decisions: list[Decision] = []
    code = 0
    for name, step in steps.items():
        look.say(f"step {name}")
        started = time.monotonic()
        try:
            if started >= look.deadline:
                raise TimeoutError("the time limit was reached (--minutes)")
            rows[name] = step(look)
            found = decide(name, rows[name])
        except Exception as error:
            code = int(isinstance(error, WrongResultsError))
            rows[name] = {**rows.get(name, {}), "failed": str(error) if code else first_line(error)}
            found = decide(name, rows[name])
        rows[name]["seconds"] = round(time.monotonic() - started, 1)
        decisions += found
        for each in found:
            look.say(f"  {each.question} {each.decision}")
        save({"steps": rows, "decisions": [each._asdict() for each in decisions]})
        if code:
            break
    look.say(table(decisions))
    return code
