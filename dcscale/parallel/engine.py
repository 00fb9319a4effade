"""The only place that imports DeepSpeed: build, forward, backward, update, save and load under any ZeRO stage."""

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
from dcscale.parallel.zero_state import SavedState, Snapshot, read_state, round_masters, take_snapshot

T = TypeVar("T")


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or not a number; the weights have not been touched by it."""


def _import_deepspeed(environment: Environment) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if environment.device.type == "cuda" else "cpu")
    # DeepSpeed calls collectives by names that torch 2.13 is renaming; nothing a user of ours can act on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps what DeepSpeed prints on every rank while it starts from the user, unless it then fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise


def start_distributed(environment: Environment, timeout_minutes: float) -> None:
    """Joins the process group of the run; collectives that wait longer than the timeout raise."""
    deepspeed = _import_deepspeed(environment)
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    with _without_chatter():
        if environment.device.type == "cpu":
            # Else every first run compiles, and then spins in, an all-reduce that only inference uses.
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
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A model with its optimizer, spread over the ranks.

    Args:
        config: the run's settings.
        environment: this process; :func:`start_distributed` must have been called.
        build_model: makes the module; under ZeRO-3 its parameters are partitioned as they are made.
        initialize: fills the module's parameters; gets the module and a context-manager factory that
            gathers the parameters it is given and keeps what is written to them.
        build_optimizer: makes the torch optimizer, with learning rate 0, from the module.
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
        with _without_chatter():
            self._engine, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        # Without ZeRO, DeepSpeed makes bf16's optimizer state by a step with zero gradients (and our learning rate of
        # 0). That step must not count, or it would falsify Adam's bias correction.
        for state in optimizer.state.values():
            state["step"].zero_()
        optimizer.register_step_pre_hook(self._before_update)
        # Counts, stop flags and errors travel on the CPU, so that no rank waits for its GPU to hear of them.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(minutes=config.parallel.timeout_minutes))

    @property
    def module(self) -> nn.Module:
        """The module itself; under ZeRO-3 its parameters are there only inside their own module's forward."""
        return self._engine.module

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that the model computes with."""
        return next(self.module.parameters()).dtype

    # -- one optimizer step ---------------------------------------------------------------------------------

    def forward_backward(self, inputs: Sequence[Tensor | None], scale: float, last: bool) -> Tensor:
        """Adds the gradient of ``scale * loss`` for one micro-batch, where the loss is the module's float32 sum.

        DeepSpeed averages gradients over ranks: for the gradient of a global mean, ``scale`` is
        ranks / (targets of the whole global batch). ``last`` marks the step's last micro-batch.
        Returns the unscaled loss sum of this rank, detached, on the device.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(*inputs)
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def update(self, learning_rate: float) -> float:
        """Clips the gradients, takes the optimizer step and returns the global gradient norm before clipping.

        The host waits for the norm once a step, as DeepSpeed does to clip; nothing else in a step waits.

        Raises:
            NonFiniteError: the norm is not finite; no weight was changed.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self._grad_norm = None
        self._engine.step()
        if self._grad_norm is None:  # DeepSpeed saw a non-finite norm itself and left the update out
            raise NonFiniteError(f"gradient norm {float(self._engine.get_global_grad_norm())}")
        return self._grad_norm

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs inside DeepSpeed's step, after its reduction and before torch's update; once a group in some stages."""
        if self._grad_norm is not None:
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
        """Gives the module's forward, without gradients and in eval mode."""
        was_training = self.module.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield self._engine
        finally:
            self._engine.train(was_training)

    # -- words between ranks ----------------------------------------------------------------------------------

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
        """Goes on from a state that any number of ranks have saved in any stage and precision; all ranks call it.

        A rank reads what it will update. The settings of the optimizer are the config's: none are saved.

        Raises:
            RankError: on the ranks where reading did not fail, if it did on another.
        """
        run_on_all_ranks(lambda: read_state(self._engine, self._optimizer, saved))
        round_masters(self._engine)

    def _gather_for_writing(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.stage == 3)
