"""The training state of a DeepSpeed engine, as ranges of elements of named parameters: independent of ZeRO.

DeepSpeed has torch's optimizer update float32 tensors whose layout depends on the ZeRO stage and the number of ranks.
Such a tensor is called a *master* here; AdamW keeps its moments in tensors of the same shape. The masters are:

=========  =========================================================================================================
stage 0    fp32: the parameters themselves. bf16: a float32 copy of each parameter. Each rank has all of them.
stage 1/2  Per param group: all parameters flattened into one vector, padded and cut into one contiguous partition per
           rank. The master is the rank's partition. A parameter that crosses a boundary is on two or more ranks, and
           a rank has nothing of most parameters.
stage 3    Each parameter is flattened, padded and cut into one slice per rank. The master is the concatenation of the
           rank's slices of all parameters of a sub group (the parameters that ZeRO-3 updates at once).
=========  =========================================================================================================

A :class:`Fragment` maps a range of elements of a parameter to a range of elements of a master. A state that is read and
written through fragments is the same for every stage and number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state in torch."""
KINDS = (MASTER, *MOMENTS)
"""The three float32 values of each element of a parameter: its master weight and AdamW's two moments."""

FragmentKey = tuple[str, str, int]
"""Name of a parameter, one of ``KINDS``, index of the first element in the flattened parameter."""


@dataclass(frozen=True)
class Snapshot:
    """A copy on the CPU of one rank's part of the training state, after ``steps`` optimizer steps.

    The parts of all ranks together hold every element exactly once. A snapshot therefore takes 12 bytes (three float32
    values) per parameter of the model, divided by the number of ranks. Ranks differ a little because of the padding.
    """

    rank: int
    ranks: int
    steps: int
    shapes: dict[str, tuple[int, ...]]
    """Shapes of all parameters of the model, by name."""
    tensors: dict[FragmentKey, Tensor]
    """Float32 [elements] of each fragment."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class SavedState(Protocol):
    """A saved training state, as :meth:`dcscale.parallel.Engine.load` reads it."""

    steps: int
    """Optimizer steps it has made."""

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises if the state does not belong to a model with these parameters."""

    def fill(self, targets: Mapping[tuple[str, str], tuple[int, Tensor]]) -> None:
        """Copies saved elements into targets: (name, kind) -> (index of the first element, float32 [elements])."""


class Fragment(NamedTuple):
    """Elements ``start`` to ``start + numel`` of parameter ``name``, at elements ``offset`` onwards of ``master``."""

    name: str
    start: int
    numel: int
    master: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """This fragment's elements, [numel], of the master or of a moment with the same layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def shard(self, rank: int, ranks: int) -> Fragment:
        """The part of ``rank`` when the fragment is split evenly over ``ranks``."""
        first, last = (self.numel * r // ranks for r in (rank, rank + 1))
        return self._replace(start=self.start + first, numel=last - first, offset=self.offset + first)


def take_snapshot(engine: Any, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies this rank's part of the state of a DeepSpeed engine to the CPU.

    Args:
        engine: the DeepSpeed engine.
        optimizer: the torch optimizer that it wraps.
    """
    rank, ranks = engine.global_rank, engine.world_size
    tensors = {}
    for fragment in _fragments_of_rank(engine):
        if engine.zero_optimization_stage() == 0:  # every rank has everything: each saves its share
            fragment = fragment.shard(rank, ranks)
        moments = optimizer.state.get(fragment.master)
        for kind in KINDS if fragment.numel else ():
            if kind == MASTER:
                part = fragment.view(fragment.master).to("cpu", copy=True)
            elif moments:
                part = fragment.view(moments[kind]).to("cpu", copy=True)
            else:  # AdamW creates its moments, as zeros, in its first step
                part = torch.zeros(fragment.numel)
            tensors[fragment.name, kind, fragment.start] = part
    return Snapshot(rank, ranks, _steps_taken(optimizer), _parameter_shapes(engine), tensors)


def restore_masters(engine: Any, optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Fills masters, moments and step counts of this rank; then all ranks must call :func:`update_model_weights`."""
    saved.check_shapes(_parameter_shapes(engine))
    targets = {}
    for fragment in _fragments_of_rank(engine):
        master = fragment.master
        state = optimizer.state[master]
        if not state:  # the optimizer has not made a step: create its state as AdamW would
            # Fused AdamW keeps the step count on the device of the parameter.
            state["step"] = torch.zeros((), device=master.device if optimizer.defaults["fused"] else "cpu")
            state.update({kind: torch.zeros_like(master) for kind in MOMENTS})
        state["step"].fill_(saved.steps)
        for kind in KINDS:
            targets[fragment.name, kind] = (fragment.start, fragment.view(master if kind == MASTER else state[kind]))
    saved.fill(targets)


def update_model_weights(engine: Any) -> None:
    """Sets the weights that the model computes with to the (rounded) masters, as DeepSpeed does after each update.

    All ranks call it together.
    """
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter, master in _master_copies(wrapper).items():
            parameter.data.copy_(master.data)
    elif stage == 3:
        wrapper.checkpoint_event_prologue()  # partitions the parameters that are gathered
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            # Copies this rank's float32 slices into its slices of the parameters.
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        # Gathers the persistent parameters: those below stage3_param_persistence_threshold stay on all ranks.
        wrapper.checkpoint_event_epilogue()
    else:
        wrapper.update_lp_params()  # rounds this rank's partition, then all-gathers the partitions of all ranks


def _parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    # A partitioned parameter of ZeRO-3 is empty itself; DeepSpeed keeps its full shape in ds_shape.
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def _fragments_of_rank(engine: Any) -> Iterator[Fragment]:
    """The elements that this rank updates: all of them on every rank without ZeRO, else disjoint parts."""
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    copies = _master_copies(wrapper) if stage == 0 else {}
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            yield Fragment(name, 0, parameter.numel(), copies.get(parameter, parameter), 0)
        elif stage == 3:
            # Index of the sub group, this parameter's offset in its master, and elements of a slice with padding.
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            # Rank r holds elements r * length to (r + 1) * length of the flattened parameter, ...
            start = engine.global_rank * length
            numel = min(length, parameter.ds_numel - start)  # ... beyond the parameter's end they are padding
            if numel > 0:
                yield Fragment(name, start, numel, wrapper.fp32_partitioned_groups_flat[group], offset)
        elif parameter._hp_mapping is not None:  # None: no element of the parameter is in this rank's partition
            # DeepSpeed's own link from the low-precision (lp) parameter to its float32 (hp) elements on this rank:
            # lp_fragment_address is a range of the parameter, hp_fragment_address one of the partition.
            mapping = parameter._hp_mapping
            (master,) = wrapper.param_groups[mapping.param_group_index]["params"]
            address = mapping.lp_fragment_address
            yield Fragment(name, address.start, address.numel, master, mapping.hp_fragment_address.start)


def _master_copies(wrapper: Any) -> dict[Tensor, Tensor]:
    """Stage 0: bf16 parameter -> its float32 master; empty where the parameters are float32 and masters themselves."""
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True) if hasattr(wrapper, "fp32_groups") else ()
    return {p: copy for parameters, copies in groups for p, copy in zip(parameters, copies, strict=True)}


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """AdamW's step count, which its bias correction uses."""
    counts = {int(state["step"]) for state in optimizer.state.values()}
    if len(counts) > 1:
        raise RuntimeError(f"the optimizer has made {sorted(counts)} steps with different parameters")
    return counts.pop() if counts else 0
