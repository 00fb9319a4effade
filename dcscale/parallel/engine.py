"""The only module that imports DeepSpeed: build, forward, backward, update, save and load under any ZeRO stage."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcscale.config import Config
from dcscale.parallel.agreement import check_agreement, start_facts
from dcscale.parallel.collectives import gather_objects, run_on_all_ranks
from dcscale.parallel.deepspeed_config import NO_CLIP, deepspeed_config
from dcscale.parallel.environment import Environment
from dcscale.parallel.rendezvous import join, set_current_rendezvous
from dcscale.parallel.step_clock import StepClock
from dcscale.parallel.zero_state import SavedState, Snapshot, restore_masters, take_snapshot, update_model_weights

T = TypeVar("T")


def _import_deepspeed(environment: Environment) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if environment.device.type == "cuda" else "cpu")
    # DeepSpeed uses names of collectives that torch 2.13 deprecates; users of dcscale can do nothing about it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _capture_stdout() -> Iterator[None]:
    """Hides what DeepSpeed prints on every rank while it starts; prints it if the start fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    except BaseException:
        sys.stderr.write(output.getvalue())
        raise


def start_distributed(environment: Environment, timeout_minutes: float, config: Config | None = None) -> None:
    """Meets the other ranks, compares what must be the same on all, and initialises the process group of the run.

    Does nothing if this process has a process group already.

    Args:
        timeout_minutes: for the ranks to meet, and of collectives until :func:`set_timeouts`.
        config: the settings of the run, which are compared too.

    Raises:
        ArrivalError, DisagreementError: see :mod:`dcscale.parallel.rendezvous` and :mod:`dcscale.parallel.agreement`.
    """
    if dist.is_initialized():
        return
    deepspeed = _import_deepspeed(environment)
    device_id = None
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
        device_id = environment.device if environment.world_size > 1 else None
    rendezvous = join(environment, timeout_minutes, lambda line: print(line, file=sys.stderr, flush=True))
    set_current_rendezvous(rendezvous)
    check_agreement(rendezvous, environment, start_facts(config))
    # Makes torch keep a record of the last collectives, which tells what each rank was doing when a run hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(
        environment.backend,
        store=rendezvous.store,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device_id,
    )
    with _capture_stdout():
        if environment.device.type == "cpu":
            # This op is an all-reduce for inference only. If it seems available, DeepSpeed compiles it at the first
            # start and busy-waits in it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=environment.backend, auto_mpi_discovery=False, verbose=False)


def stop_distributed() -> None:
    """Destroys the process group and leaves the rendezvous."""
    if dist.is_initialized():
        dist.destroy_process_group()
    set_current_rendezvous(None)


class Engine:
    """A model and its optimizer, under DeepSpeed.

    Args:
        config: the run's settings.
        environment: rank and device of this process; :func:`start_distributed` must have been called.
        build_model: builds the module; under ZeRO-3 each parameter is partitioned as soon as it is created.
        initialize: initialises the parameters, called with the module and ``gather``. ``gather(parameters)`` is a
            context manager in which these parameters are complete on every rank; rank 0's values are kept.
        build_optimizer: builds the torch optimizer of the module, with learning rate 0.
    """

    def __init__(
        self,
        config: Config,
        environment: Environment,
        build_model: Callable[[], nn.Module],
        initialize: Callable[[nn.Module, Callable], None],
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ):
        self._deepspeed = _import_deepspeed(environment)
        self.environment = environment
        self.clock = StepClock(environment.device)
        self.stage = config.parallel.zero_stage
        self._clip = config.train.gradient_clipping or NO_CLIP
        self._clips_here = self.stage == 0 and config.train.precision == "fp32"
        self._withheld: list[tuple[nn.Parameter, Tensor | None]] = []
        """Parameters of an update that is not made, with their gradients."""
        ds_config = deepspeed_config(config, environment.world_size)

        with (
            torch.device(environment.device) if self.stage != 3 else contextlib.nullcontext(),
            self._deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=self.stage == 3),
        ):
            model = build_model()
        initialize(model, self._gather_for_writing)
        if self.stage != 3 and config.train.precision == "bf16":
            model.to(torch.bfloat16)
        optimizer = build_optimizer(model)
        self._optimizer = optimizer
        with _capture_stdout():
            self._engine, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        # Without ZeRO, DeepSpeed creates the optimizer state of bf16 by a step with zero gradients (and our learning
        # rate of 0). That step must not be counted, or Adam's bias correction would be wrong.
        for state in optimizer.state.values():
            state["step"].zero_()
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)
        # Counts, stop flags and errors are exchanged over gloo on the CPU, which needs no synchronisation with the GPU.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(minutes=config.parallel.start_timeout_minutes))

    @property
    def module(self) -> nn.Module:
        """The module itself; under ZeRO-3 a parameter is complete only while its own module runs forward."""
        return self._engine.module

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that the model computes with."""
        return next(self.module.parameters()).dtype

    # -- one optimizer step ---------------------------------------------------------------------------------

    def forward_backward(self, inputs: Sequence[Tensor | None], scale: float, last: bool) -> Tensor:
        """Accumulates the gradient of ``scale * loss`` of one micro-batch; the loss is a float32 sum over its targets.

        Args:
            inputs: arguments of the module.
            scale: factor on the loss. DeepSpeed averages gradients over ranks, so the gradient of the mean loss over
                the global batch needs ``scale = ranks / targets in the global batch``.
            last: whether this is the step's last micro-batch.

        Returns:
            The unscaled loss sum of this rank, detached, on the device.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        with self.clock.phase("forward"):
            loss = self._engine(*inputs)
        with self.clock.phase("backward"):
            self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def update(self, learning_rate: float, loss_sum: Tensor, accept: Callable[[float, float], bool]) -> None:
        """Clips the gradients and makes the optimizer step, if ``accept`` agrees to it.

        The host waits for loss and norm, as DeepSpeed does to clip: the only synchronisation with the device in a step.

        Args:
            learning_rate: of this step, before the ``lr_scale`` of each parameter group.
            loss_sum: loss sum of this rank, float64 scalar on the device.
            accept: called once, between the reduction of the gradients and the update, with the loss sum of all ranks
                and the global L2 norm of the gradient before clipping, which are the same on every rank. If it returns
                False, the gradients are dropped, and weights, moments and AdamW's step count stay what they are. It
                must do so if a value is not finite.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self._loss_sum, self._accept = loss_sum, accept
        self._accepted: bool | None = None
        with self.clock.phase("update"):
            self._engine.step()
            if self._accepted is None:  # DeepSpeed saw a norm that is not finite itself and made no update
                self._decide(self._engine.get_global_grad_norm())
                assert not self._accepted, "an update that was accepted was not made"

    def _decide(self, norm: Tensor | float) -> None:
        # All ranks must decide alike. Summing makes the values equal in every bit, also where each rank has computed
        # the norm itself. In float64, the sum of equal float32 norms is exact.
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self.environment.device)
        loss_sum, norms = self.sum_tensor_over_ranks(torch.stack([self._loss_sum, norm])).tolist()
        self.clock.device_caught_up()
        self._accepted = self._accept(loss_sum, norms / self.environment.world_size)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Decides inside DeepSpeed's step, between its reduction of the gradients and torch's update."""
        if self._accepted is None:  # ZeRO calls the optimizer once per param group or sub group
            if self._clips_here:
                self._decide(nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._clip))
            else:
                self._decide(self._engine.optimizer._global_grad_norm)
        if not self._accepted:
            # torch changes nothing of a parameter without a gradient. DeepSpeed completes its step, so it is clean.
            self._withheld = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
            for parameter, _ in self._withheld:
                parameter.grad = None

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._withheld:  # with offloading, ZeRO uses the same buffers in every step
            parameter.grad = gradient
        self._withheld = []

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Callable[..., Tensor]]:
        """Yields the module's forward, in eval mode and without gradients."""
        was_training = self.module.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield self._engine
        finally:
            self._engine.train(was_training)

    # -- communication -----------------------------------------------------------------------------------------

    def barrier(self, seconds: float = 30.0) -> bool:
        """Waits until all ranks have called it; returns whether they have, within so many seconds."""
        try:
            dist.monitored_barrier(self._control, timedelta(seconds=seconds))
        except RuntimeError:  # another rank was lost, or is too slow
            return False
        return True

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        """Sums small integers over the ranks, on the CPU."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def sum_tensor_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sums a device tensor over the ranks in place and returns it."""
        dist.all_reduce(tensor)
        return tensor

    def gather_on_rank0(self, tensor: Tensor) -> list[Tensor] | None:
        """The CPU tensors of all ranks, of equal shape, by rank, on rank 0; None on the others, which do not wait."""
        tensors = None
        if self.environment.is_main:
            tensors = [torch.empty_like(tensor) for _ in range(self.environment.world_size)]
        dist.gather(tensor, tensors, group=self._control)
        return tensors

    def gather_objects(self, value: T) -> list[T]:
        """:func:`dcscale.parallel.collectives.gather_objects`, on the CPU."""
        return gather_objects(value, self._control)

    # -- state ------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Copies this rank's part of the training state to the CPU: no other rank and no file is involved."""
        return take_snapshot(self._engine, self._optimizer)

    def load(self, saved: SavedState) -> None:
        """Loads a state that was saved by any number of ranks in any stage and precision; all ranks call it together.

        Each rank reads only the elements that it updates. Hyperparameters come from the config; none are saved.

        Raises:
            RankError: on the ranks where reading succeeded, if it failed on another rank.
        """
        run_on_all_ranks(lambda: restore_masters(self._engine, self._optimizer, saved))
        update_model_weights(self._engine)

    def _gather_for_writing(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.stage == 3)
