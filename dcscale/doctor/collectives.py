"""Does an all-reduce give the right sum on every rank, which rank is wrong if not, and how fast is it?

Every sum is known in advance. Integers are compared exactly, also in floating point, where they are small enough; other
floats by their error and by their bits, which must be the same on all ranks. If the sum is wrong everywhere, any rank
may have caused it: then ranks exchange numbers in disjoint pairs, and that one is named with which most go wrong.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.links import MOST_ROUNDS, blame, gigabits, pair_rounds

SIZES = (1, 1009, (1 << 18) + 3)
"""Elements of the sums that are compared: one, a prime, and more than collectives send in one piece."""
RATE_BYTES = (1 << 16, 1 << 20, 1 << 24)
RATE_BYTES_CUDA = (*RATE_BYTES, 1 << 28)
"""Sizes at which the bandwidth is measured."""
_RANDOM = 4096

Tamper = Callable[[Tensor], Tensor]
"""For tests: makes a rank's tensors wrong."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


def all_reduce_problems(
    group: dist.ProcessGroup,
    device: torch.device,
    before: Tamper = _same,
    after: Tamper = _same,
    sizes: Sequence[int] = SIZES,
) -> dict[str, Any]:
    """Sums tensors over the ranks of ``group``; all ranks call it together.

    Args:
        group: of all ranks.
        device: of the tensors.
        before: of what this rank puts in; for tests, as ``after``, of what it gets.
        after: see ``before``.
        sizes: elements.

    Returns:
        JSON: ``wrong``, what was wrong here, and ``digest`` of the bits of the sum of random floats.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    wrong = []
    for dtype in (torch.int64, torch.int32, torch.float32, torch.bfloat16):
        modulus = _modulus(dtype, ranks)
        for size in sizes if modulus else ():
            expected = sum_of_values(size, ranks, modulus, device).to(dtype)
            found = before(values(size, rank, modulus, device).to(dtype))
            dist.all_reduce(found, group=group)
            found = after(found)
            different = (found != expected).nonzero()
            if len(different):
                place = int(different[0])
                name = str(dtype).removeprefix("torch.")
                wrong.append(
                    f"{len(different):,} of {size:,} sums of {name}, the first {found[place].item()} instead of "
                    f"{expected[place].item()}"
                )
    inputs_RE = torch.stack([_random(other) for other in range(ranks)])
    exact_E, bound_E = inputs_RE.double().sum(0), inputs_RE.double().abs().sum(0) * ranks * torch.finfo().eps
    found = before(inputs_RE[rank].to(device))
    dist.all_reduce(found, group=group)
    found = after(found).cpu()
    beyond = int(((found.double() - exact_E).abs() > bound_E).sum())
    if beyond:
        wrong.append(f"{beyond:,} of {_RANDOM:,} sums of random float32 by more than rounding")
    return {"wrong": wrong, "digest": hashlib.sha256(found.numpy().tobytes()).hexdigest()}


def _modulus(dtype: torch.dtype, ranks: int) -> int:
    """Values are below it, so that all sums are exact; 0: there are too many ranks for this type."""
    largest = {torch.int64: 1 << 62, torch.int32: 1 << 30, torch.float32: 1 << 24, torch.bfloat16: 1 << 8}[dtype]
    return next((modulus for modulus in (1009, 61, 7, 2) if (modulus - 1) * ranks <= largest), 0)


def values(size: int, rank: int, modulus: int, device: torch.device) -> Tensor:
    """What a rank puts into a sum: (i + 3 rank) mod ``modulus``, int64 [size]."""
    return (torch.arange(size, device=device) + 3 * rank) % modulus


def sum_of_values(size: int, ranks: int, modulus: int, device: torch.device) -> Tensor:
    """The sum of :func:`values` over all ranks, int64 [size]."""
    index = torch.arange(min(size, modulus))
    period = sum((index + 3 * rank) % modulus for rank in range(ranks))
    return period.repeat(-(-size // len(period)))[:size].to(device)


def _random(rank: int) -> Tensor:
    return torch.randn(_RANDOM, generator=torch.Generator().manual_seed(rank))


def pair_problems(
    group: dist.ProcessGroup, device: torch.device, before: Tamper = _same, after: Tamper = _same
) -> list[int]:
    """Exchanges values with other ranks in disjoint pairs; all ranks call it together.

    Returns:
        The ranks whose values, added to this rank's, gave a wrong sum.
    """
    rank, size = dist.get_rank(group), SIZES[-1]
    wrong = []
    for pairs in pair_rounds(dist.get_world_size(group), MOST_ROUNDS):
        for low, high in pairs:
            if rank not in (low, high):
                continue
            partner = low + high - rank
            own, other = before(values(size, rank, 1009, device)), torch.empty(size, dtype=torch.int64, device=device)
            calls = [dist.P2POp(dist.isend, own, partner, group), dist.P2POp(dist.irecv, other, partner, group)]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
            expected = values(size, rank, 1009, device) + values(size, partner, 1009, device)
            if not torch.equal(after(own + other), expected):
                wrong.append(partner)
    return wrong


def wrong_ranks(problems: Sequence[dict[str, Any]]) -> list[int]:
    """Ranks whose sums are wrong, or have other bits than most, from what :func:`all_reduce_problems` gave each."""
    usual = Counter(problem["digest"] for problem in problems).most_common(1)[0][0]
    return [rank for rank, found in enumerate(problems) if found["wrong"] or found["digest"] != usual]


def judge_sums(
    backend: str,
    problems: Sequence[dict[str, Any]],
    pairs: Sequence[Sequence[int]],
    hosts: Sequence[str],
) -> list[Finding]:
    """Which ranks make an all-reduce wrong.

    Args:
        backend: gloo or nccl.
        problems: of each rank, see :func:`all_reduce_problems`.
        pairs: of each rank, see :func:`pair_problems`; only needed if all have a wrong sum.
        hosts: of each rank.
    """
    check, rule = f"all-reduce ({backend})", "exact sums of integers, the same bits on all ranks"
    wrong = wrong_ranks(problems)
    if not wrong:
        types = "int64, int32, float32 and bfloat16"
        return [Finding(check, Verdict.GOOD, "all", f"right on all {len(hosts)} ranks, {types}", rule)]
    culprits, both = wrong, False
    unclear = len(wrong) == len(hosts) and not any(pairs)
    if any(pairs):
        bad = [(rank, other) for rank, others in enumerate(pairs) for other in others]
        measured = [pair for found in pair_rounds(len(hosts), MOST_ROUNDS) for pair in found]
        causes, ends = blame(bad, measured)
        culprits, both = causes or ends, not causes
    way_out = "keep jobs off this node and test its memory and GPUs (dcgmi diag -r 3)"
    if backend == "nccl":
        way_out += "; NCCL_P2P_DISABLE=1 or NCCL_ALGO=Ring tells whether it is a link between GPUs"
    findings = []
    for rank in culprits:
        texts = problems[rank]["wrong"] or ["other bits of the same sum than most ranks"]
        whose = f"rank {rank}, or a rank it was paired with" if both else f"rank {rank}"
        if unclear:
            whose += ", or any other: all sums are wrong, but pairs of ranks agree"
        findings.append(Finding(check, Verdict.BAD, hosts[rank], f"{whose}: {texts[0]}", rule, way_out))
    return findings


def all_reduce_rates(group: dist.ProcessGroup, device: torch.device, longest: float = 0.5) -> dict[int, float]:
    """Bus bandwidth of an all-reduce in bytes per second, by size in bytes: the best of three runs, of the slowest
    rank. All ranks call it together.

    It is 2 (N - 1) / N of the size divided by the time: what each rank has to send, whatever the number of ranks. No
    larger size is tried after a measurement of more than ``longest`` seconds.
    """
    ranks = dist.get_world_size(group)
    found = {}
    for size in RATE_BYTES if device.type == "cpu" else RATE_BYTES_CUDA:
        tensor = torch.ones(size // 4, device=device)
        runs = []
        for _ in range(4):
            _synchronize(device)
            begun = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            _synchronize(device)
            runs.append(time.perf_counter() - begun)
        slowest = torch.tensor([min(runs[1:]), sum(runs)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        best, total = slowest.tolist()
        found[size] = 2 * (ranks - 1) / ranks * size / best
        if total > longest:
            break
    return found


def judge_rates(backend: str, rates: dict[int, float], link: float | None) -> Finding:
    """The bandwidth by size; bad if NCCL across nodes is slower than TCP.

    Args:
        backend: gloo or nccl.
        rates: see :func:`all_reduce_rates`.
        link: median bandwidth of a TCP link between nodes in bytes per second; None: one node.
    """
    check = f"all-reduce speed ({backend})"
    value = ", ".join(f"{_size(size)} {gigabits(rate)}" for size, rate in rates.items())
    best = max(rates.values())
    if backend != "nccl" or link is None:
        return Finding(check, Verdict.GOOD, "all", value, "no limit: compare with what the links can do")
    least = link / 2
    rule = f"at least {gigabits(least)} at the best size: half of what one TCP connection between nodes reaches"
    if best >= least:
        return Finding(check, Verdict.GOOD, "all", value, rule)
    way_out = "NCCL_DEBUG=INFO shows which network it uses (NET/IB or NET/Socket); set NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
    return Finding(check, Verdict.BAD, "all", value, rule, way_out)


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
