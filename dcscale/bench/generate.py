"""Speed of text generation: DCFormer by dcscale, by its export in transformers, and transformers' Llama, in one run.

All have the same shape and random weights. Each kind's own ``generate`` continues the same prompts greedily; each round
calls every kind once, so that other load of the machine affects all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dcscale.cli import ResultError
from dcscale.config import Config
from dcscale.config.schema import ModelConfig
from dcscale.convert.formats.huggingface import write_settings
from dcscale.models import DCFormer, generate, initialize

KINDS = {
    "dcscale": "DCFormer, dcscale",
    "export": "the same exported, transformers",
    "mha": "the same without compose, dcscale",
    "llama": "Llama (no qk-norm), transformers",
}
TARGETS = {"llama": 0.8, "export": 1.0}
"""dcscale's tokens per CPU-second at least, relative to those of another kind."""
LOGITS_RTOL = 1e-3
"""How far the export's logits may be from dcscale's, relative to the largest."""


class Shape(NamedTuple):
    """Sizes of the models and texts."""

    layers: int = 8
    dim: int = 256
    heads: int = 8
    ffn_dim: int = 704
    vocab_size: int = 4096
    prompt_tokens: int = 128
    new_tokens: int = 128


class WrongResultsError(RuntimeError):
    """The export does not compute what dcscale computes, so their speeds do not compare."""


Generate = Callable[[list[list[int]]], object]


def make_kinds(shape: Shape) -> dict[str, Generate]:
    """Functions that continue prompts by ``shape.new_tokens`` tokens, in the order of :data:`KINDS`.

    Raises:
        WrongResultsError: the logits of the export differ from dcscale's.
    """
    model = _model(shape, "dcmha")
    export = exported(model)
    compare(model, export, make_prompts(1, shape))
    return {
        "dcscale": _by_dcscale(model, shape),
        "export": _by_transformers(export, shape),
        "mha": _by_dcscale(_model(shape, "mha"), shape),
        "llama": _by_transformers(_llama(shape), shape),
    }


def _model(shape: Shape, attention: str) -> DCFormer:
    sizes = {name: getattr(shape, name) for name in ("layers", "dim", "heads", "ffn_dim", "vocab_size")}
    config = ModelConfig(**sizes, attention=attention, windows=[None])
    model = DCFormer(config)
    initialize(model, config, seed=0)
    return model


def _by_dcscale(model: DCFormer, shape: Shape) -> Generate:
    return lambda prompts: generate(model, prompts, shape.new_tokens, temperature=0.0, top_p=1.0, seed=0)


def _by_transformers(model: Any, shape: Shape) -> Generate:
    def run(prompts: list[list[int]]) -> torch.Tensor:
        ids_BT = torch.tensor(prompts)
        length = {"max_new_tokens": shape.new_tokens, "min_new_tokens": shape.new_tokens}
        return model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, **length)

    return run


def exported(model: DCFormer) -> Any:
    """The network of an export, with the weights of ``model``; no files are written."""
    from dcscale.convert.formats.modeling_dcscale import DCScaleConfig, DCScaleForCausalLM

    settings = write_settings(Config(model=model.config), "float32", None, {})
    for name in ("architectures", "auto_map", "model_type"):
        del settings[name]
    export = DCScaleForCausalLM(DCScaleConfig(**settings, pad_token_id=0)).eval()
    export.load_state_dict(model.state_dict())
    return export


def _llama(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def compare(model: DCFormer, export: Any, prompts: list[list[int]]) -> None:
    """Raise WrongResultsError if the logits of the two differ by more than :data:`LOGITS_RTOL`."""
    ids_BT = torch.tensor(prompts)
    expected, found = model(ids_BT), export(ids_BT).logits
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= LOGITS_RTOL:
        raise WrongResultsError(
            f"the export's logits differ from dcscale's by {error:.2g} of the largest, expected at most {LOGITS_RTOL:g}"
        )


def make_prompts(batch: int, shape: Shape) -> list[list[int]]:
    """Random prompts of the same length."""
    ids = torch.randint(shape.vocab_size, (batch, shape.prompt_tokens), generator=torch.Generator().manual_seed(batch))
    return ids.tolist()


def measure(
    runs: Mapping[str, Generate], batches: Sequence[int], rounds: int, shape: Shape, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time ``rounds`` calls of each of :func:`make_kinds` for each batch size, after one that is not timed.

    Returns:
        A row for each kind and batch: seconds of CPU and wall of all rounds, tokens per CPU-second and per second as
        mean and sd, and ``times_llama``: mean and sd over the rounds of the ratio of tokens per CPU-second to Llama's.
    """
    rows = []
    for batch in batches:
        prompts, tokens = make_prompts(batch, shape), batch * shape.new_tokens
        seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in runs}
        for number in range(rounds + 1):
            for kind, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run(prompts)
                if number > 0:
                    seconds[kind].append((time.process_time() - cpu, time.perf_counter() - wall))
        for kind in runs:
            cpu, wall = ([pair[i] for pair in seconds[kind]] for i in (0, 1))
            row = {"kind": kind, "batch": batch, "rounds": rounds, "cpu_seconds": cpu, "wall_seconds": wall}
            row["tokens_per_cpu_second"] = _mean([tokens / each for each in cpu])
            row["tokens_per_second"] = _mean([tokens / each for each in wall])
            row["times_llama"] = _mean([llama[0] / own for llama, own in zip(seconds["llama"], cpu)])
            rows.append(row)
        say(f"  batch {batch} is done")
    return rows


def _mean(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The targets, each with the verdict "reached" or "missed" and the figure."""
    found = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        rates = {row["kind"]: row["tokens_per_cpu_second"]["mean"] for row in rows if row["batch"] == batch}
        for kind, least in TARGETS.items():
            ratio = rates["dcscale"] / rates[kind]
            target = f"batch {batch}: dcscale at least {least:g} x {kind}'s tokens per CPU-second"
            verdict = "reached" if ratio >= least else "missed"
            found.append({"target": target, "verdict": verdict, "detail": f"{ratio:.2f} x"})
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result.

    Raises:
        ResultError: the JSON is not a result of bench_generate.
    """
    try:
        shape, machine = result["shape"], result["machine"]
        lines = [
            f"{shape['layers']} layers, dim {shape['dim']}, {shape['heads']} heads, ffn {shape['ffn_dim']}, vocabulary "
            f"{shape['vocab_size']}, float32; {shape['prompt_tokens']} prompt and {shape['new_tokens']} new tokens; "
            f"{machine['threads']} thread of an {machine['name']}, load {machine['load_average']} at the start; torch "
            f"{result['versions']['torch']}, transformers {result['versions']['transformers']}; {result['date'][:10]}, "
            f"commit {result['commit']}; mean (sd) of the rounds",
            "",
            "| | sequences | rounds | tokens/CPU-s | x Llama | CPU ms a step | tokens/s |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            step_ms = 1e3 * statistics.mean(row["cpu_seconds"]) / shape["new_tokens"]
            rate, wall_rate = (_spread(row[name], 1) for name in ("tokens_per_cpu_second", "tokens_per_second"))
            ratio = _spread(row["times_llama"], 2)
            cells = (KINDS[row["kind"]], row["batch"], row["rounds"], rate, ratio, f"{step_ms:.2f}", wall_rate)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", *(f"- {each['target']}: {each['verdict']} {each['detail']}" for each in result["targets"])]
        return "\n".join(lines)
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"it is not a result of bench_generate: {type(error).__name__} {error}") from error


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['mean']:.{digits}f} ({value['sd']:.{digits}f})"
