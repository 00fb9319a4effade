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
from dcscale.parallel.collectives import gather_errors, gather_objects, run_on_all_ranks
from dcscale.parallel.deepspeed_config import NO_CLIP, deepspeed_config
from dcscale.parallel.environment import Environment
from dcscale.parallel.zero_state import SavedState, Snapshot, restore_masters, take_snapshot, update_model_weights

T = TypeVar("T")


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or NaN; the weights were not updated with it."""


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


def start_distributed(environment: Environment, timeout_minutes: float) -> None:
    """Initialises the process group of the run; a collective that takes longer than the timeout raises."""
    deepspeed = _import_deepspeed(environment)
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    with _capture_stdout():
        if environment.device.type == "cpu":
            # This op is an all-reduce for inference only. If it seems available, DeepSpeed compiles it at the first
            # start and busy-waits in it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend=environment.backend,
            auto_mpi_discovery=False,
            timeout=timedelta(minutes=timeout_minutes),
            rank=environment.rank,
            world_size=environment.world_size,
            verbose=False,
        )


def stop_distributed() -> None:
    """Destroys the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
        self.stage = config.parallel.zero_stage
        self._clip = config.train.gradient_clipping or NO_CLIP
        self._clips_here = self.stage == 0 and config.train.precision == "fp32"
        self._grad_norm: float | None = None
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
        # Counts, stop flags and errors are exchanged over gloo on the CPU, which needs no synchronisation with the GPU.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(minutes=config.parallel.timeout_minutes))

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
        loss = self._engine(*inputs)
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def update(self, learning_rate: float) -> float:
        """Clips the gradients and makes the optimizer step; returns the global L2 norm of the gradient before clipping.

        The host waits for the norm, as DeepSpeed does to clip: the only synchronisation with the device in a step.

        Raises:
            NonFiniteError: the norm is not finite; no weight was updated.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self._grad_norm = None
        self._engine.step()
        if self._grad_norm is None:  # DeepSpeed saw a non-finite norm itself and skipped the update
            raise NonFiniteError(f"gradient norm {float(self._engine.get_global_grad_norm())}")
        return self._grad_norm

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Checks the gradient norm inside DeepSpeed's step, between its reduction and torch's update."""
        if self._grad_norm is not None:  # ZeRO calls the optimizer once per param group or sub group
            return
        if self._clips_here:
            norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._clip))
        else:
            norm = float(self._engine.optimizer._global_grad_norm)
        if not 0 <= norm < float("inf"):
            raise NonFiniteError(f"gradient norm {norm}")
        self._grad_norm = norm

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

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        """Sums small integers over the ranks, on the CPU."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def sum_tensor_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sums a device tensor over the ranks in place and returns it."""
        dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """:func:`dcscale.parallel.collectives.gather_objects`, on the CPU."""
        return gather_objects(value, self._control)

    def gather_errors(self, error: str | None) -> str:
        """:func:`dcscale.parallel.collectives.gather_errors`, on the CPU."""
        return gather_errors(error, self._control)

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
