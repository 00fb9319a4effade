"""The training state as elements of named parameters, however DeepSpeed has spread it.

DeepSpeed has torch's optimizer update float32 tensors that depend on the ZeRO stage and the number of ranks: the
parameters themselves, copies of them, or a rank's partition of many parameters flattened into one. We call such a
tensor a *master*; AdamW keeps its moments in tensors of the master's shape. A :class:`Fragment` says which elements of
which parameter lie where in a master. Seen through fragments, a state is the same on any number of ranks in any stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
"""What there is of every element of a parameter: its float32 weight and AdamW's two moments."""

Place = tuple[str, str, int]
"""Name of a parameter, one of ``KINDS``, first element in the flattened parameter."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of one rank's part of the training state, after ``steps`` optimizer steps, on the CPU.

    The parts of all ranks hold every element once, so that a snapshot takes 12 bytes a parameter of the model divided
    by the number of ranks: three float32 values each. (Ranks differ by what DeepSpeed rounds up.)
    """

    rank: int
    ranks: int
    steps: int
    shapes: dict[str, tuple[int, ...]]
    """Of all parameters of the model, by name."""
    tensors: dict[Place, Tensor]
    """Float32 [elements]."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class SavedState(Protocol):
    """What :meth:`dcscale.parallel.Engine.load` needs of a saved state."""

    steps: int

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises if the state is not that of a model with these parameters."""

    def fill(self, targets: Mapping[tuple[str, str], tuple[int, Tensor]]) -> None:
        """Copies into each target what is saved of (name, kind) from the given first element on."""


class Fragment(NamedTuple):
    """``numel`` elements of the flattened parameter ``name`` from ``start``, and from ``offset`` of ``master``."""

    name: str
    start: int
    numel: int
    master: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's part, [numel], of the master or of a tensor that lies like it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def share(self, rank: int, ranks: int) -> Fragment:
        """One of ``ranks`` equal parts."""
        first, last = (self.numel * r // ranks for r in (rank, rank + 1))
        return self._replace(start=self.start + first, numel=last - first, offset=self.offset + first)


def take_snapshot(engine: Any, optimizer: torch.optim.Optimizer) -> Snapshot:
    """This rank's part of the state of a DeepSpeed engine, whose torch optimizer is ``optimizer``."""
    rank, ranks = engine.global_rank, engine.world_size
    tensors = {}
    for fragment in _fragments_of_rank(engine):
        if engine.zero_optimization_stage() == 0:  # every rank has everything
            fragment = fragment.share(rank, ranks)
        moments = optimizer.state.get(fragment.master)
        for kind in KINDS if fragment.numel else ():
            if kind == MASTER:
                part = fragment.of(fragment.master).to("cpu", copy=True)
            elif moments:
                part = fragment.of(moments[kind]).to("cpu", copy=True)
            else:  # AdamW makes them in its first step
                part = torch.zeros(fragment.numel)
            tensors[fragment.name, kind, fragment.start] = part
    return Snapshot(rank, ranks, _steps_taken(optimizer), _parameter_shapes(engine), tensors)


def read_state(engine: Any, optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Fills masters, moments and step counts of this rank; :func:`round_masters` must follow, on all ranks."""
    saved.check_shapes(_parameter_shapes(engine))
    targets = {}
    for fragment in _fragments_of_rank(engine):
        master = fragment.master
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device if optimizer.defaults["fused"] else "cpu")
            state.update({kind: torch.zeros_like(master) for kind in MOMENTS})
        state["step"].fill_(saved.steps)
        for kind in KINDS:
            targets[fragment.name, kind] = (fragment.start, fragment.of(master if kind == MASTER else state[kind]))
    saved.fill(targets)


def round_masters(engine: Any) -> None:
    """Sets the weights the model computes with to the masters, rounded, as DeepSpeed does after each update.

    All ranks call it together.
    """
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter, copy in _copies(wrapper).items():
            parameter.data.copy_(copy.data)
    elif stage == 3:
        wrapper.checkpoint_event_prologue()  # leaves no parameter gathered
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()  # gathers those that always are
    else:
        wrapper.update_lp_params()


def _parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def _fragments_of_rank(engine: Any) -> Iterator[Fragment]:
    """What this rank updates. Without ZeRO that is everything on every rank, else the ranks' parts are disjoint."""
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    copies = _copies(wrapper) if stage == 0 else {}
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            yield Fragment(name, 0, parameter.numel(), copies.get(parameter, parameter), 0)
        elif stage == 3:
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = engine.global_rank * length
            numel = min(length, parameter.ds_numel - start)  # the rest is padding
            if numel > 0:
                yield Fragment(name, start, numel, wrapper.fp32_partitioned_groups_flat[group], offset)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            (master,) = wrapper.param_groups[mapping.param_group_index]["params"]
            here = mapping.lp_fragment_address
            yield Fragment(name, here.start, here.numel, master, mapping.hp_fragment_address.start)


def _copies(wrapper: Any) -> dict[Tensor, Tensor]:
    """Without ZeRO: the float32 copy of every parameter in bf16; nothing where parameters are float32 themselves."""
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True) if hasattr(wrapper, "fp32_groups") else ()
    return {p: copy for parameters, copies in groups for p, copy in zip(parameters, copies, strict=True)}


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How many steps AdamW has counted for its bias correction."""
    counts = {int(state["step"]) for state in optimizer.state.values()}
    if len(counts) > 1:
        raise RuntimeError(f"the optimizer has taken {sorted(counts)} steps with different parameters")
    return counts.pop() if counts else 0
