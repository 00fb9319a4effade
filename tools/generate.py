"""Let a trained model write.

    python tools/generate.py runs/quickstart --prompt "def " --prompt "import " --new-tokens 200
    python tools/generate.py runs/quickstart/checkpoints/step-00000400 --prompt "class " --temperature 0
    python tools/generate.py downloads/DCFormer-2.8B --prompt "Beijing is" --dtype bf16

The path is a run's folder (its newest complete checkpoint is used), a checkpoint, or any other folder that
tools/convert_checkpoint.py reads. All prompts are one batch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from dcscale.cli import add_model_options, usable_device, whole_number, whole_number_from_0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--new-tokens", type=whole_number, default=200, help="tokens to generate (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy decoding (default 0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="sample from the most likely tokens of this mass (default 0.95)"
    )
    parser.add_argument("--seed", type=whole_number_from_0, default=0, help="seed of sampling (default 0)")
    options = parser.parse_args(arguments)
    options.device = usable_device(parser, options.device)
    # Imported after the arguments are parsed: this takes seconds.
    from dcscale.evaluation.loading import dtype_of, open_model
    from dcscale.models import generate
    from dcscale.observe import printable

    try:
        trained = open_model(options)
        tokenizer = trained.tokenizer
        prefix = [] if options.begin_id is None else [options.begin_id]
        prompts = [tokenizer.encode(prompt) for prompt in options.prompt]
        model = trained.load(options.device, dtype_of(options))
        importlib.import_module("torch._dynamo")  # the first operator would: a second that is not generation's
        start = time.perf_counter()
        generated = generate(
            model,
            [prefix + ids for ids in prompts],
            new_tokens=options.new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop_id=tokenizer.eos_id,
        )
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds, tokens = time.perf_counter() - start, sum(map(len, generated))
    print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)
    for text, prompt_ids, new_ids in zip(options.prompt, prompts, generated):
        print(f"----\n{printable(text + tokenizer.decode_continuation(prompt_ids, new_ids))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
