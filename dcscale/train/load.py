"""A trained model back from a checkpoint, to be used without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dcscale.checkpoint import CheckpointError, find_checkpoint, load_weights
from dcscale.checkpoint.contents import read_config, read_state
from dcscale.checkpoint.layout import OPTIMIZER, STATE, WEIGHTS, damage
from dcscale.checkpoint.probe import check_model
from dcscale.config import Config
from dcscale.data import Tokenizer
from dcscale.data.tokenizers import TOKENIZER_NAME, ByteTokenizer, HuggingFaceTokenizer
from dcscale.models import DCFormer


@dataclass(frozen=True)
class Trained:
    model: DCFormer
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path
    step: int


def load_trained(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Trained:
    """Loads the model of a checkpoint, or of a run's newest whole one, and its tokenizer.

    ``dtype`` None is the type it was trained in. Only safetensors, JSON and YAML are read: nothing is unpickled.

    Raises:
        CheckpointError: there is no whole checkpoint, a file's content has changed, its parts do not fit together, or
            the model computes something else than when it was saved. In another type or on another kind of device
            that is only a warning.
        DataError: its tokenizer cannot be loaded.
    """
    checkpoint = find_checkpoint(path)
    if problem := damage(checkpoint, left_out=OPTIMIZER):
        raise CheckpointError(f"the checkpoint is damaged: {problem}; name another one")
    config, state = read_config(checkpoint), read_state(checkpoint)
    try:
        spec, eos_id = state["tokenizer"]["spec"], state["tokenizer"]["eos_id"]
    except KeyError as error:
        raise CheckpointError(f"{checkpoint / STATE} has no entry for the tokenizer ({error})") from error
    tokenizer = ByteTokenizer() if spec == "byte" else HuggingFaceTokenizer(checkpoint / TOKENIZER_NAME, eos_id)
    if dtype is None:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = DCFormer(config.model)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    load_weights(model, checkpoint / WEIGHTS)
    check_model(model, checkpoint, dtype, device)
    return Trained(model, tokenizer, config, checkpoint, state["step"])
