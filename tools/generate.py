"""Let a trained model write.

    python tools/generate.py runs/quickstart --prompt "def " --prompt "import " --new-tokens 200
    python tools/generate.py runs/quickstart/checkpoints/step-00000400 --prompt "class " --temperature 0

The path is a run's folder (its newest whole checkpoint is used) or a checkpoint. All prompts are continued at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from dcscale.checkpoint import CheckpointError
from dcscale.models import generate
from dcscale.observe import printable
from dcscale.train.load import load_trained


def usable_device(name: str) -> torch.device:
    """The device of that name, once a number has been there and back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="run folder or checkpoint")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--new-tokens", type=int, default=200, help="tokens to write (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="keep the likeliest tokens of this probability (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default 0)")
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as trained")
    options = parser.parse_args(arguments)
    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    try:
        trained = load_trained(options.path, options.device, dtype)
        begin = time.perf_counter()
        written = generate(
            trained.model,
            [trained.tokenizer.encode(prompt) for prompt in options.prompt],
            new_tokens=options.new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop_id=trained.tokenizer.eos_id,
        )
    except (CheckpointError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds, tokens = time.perf_counter() - begin, sum(map(len, written))
    print(f"{trained.checkpoint} (step {trained.step})", file=sys.stderr)
    print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)
    for prompt, ids in zip(options.prompt, written):
        print(f"----\n{printable(prompt + trained.tokenizer.decode(ids))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
