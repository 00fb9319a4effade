"""Validates a config: every rule for single settings and between settings, before anything is built.

Pure functions that report all violations at once. Whether files exist is checked where they are opened.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator

from dcscale.config.errors import Problem, show
from dcscale.config.reference import FIELDS, get, has_type, type_name
from dcscale.config.schema import Config
from dcscale.config.schema.limits import NOT_NEGATIVE, POSITIVE, Range
from dcscale.config.schema.observe import MOST_PROFILED_STEPS
from dcscale.config.suggestions import choice_suggestion

_SHARDS = "give a folder written by tools/make_shards.py"
_NEEDS_TEXT = {
    "run.name": "the default is run",
    "run.folder": "the default is runs/${run.name}",
    "data.validation": f"{_SHARDS}, or null for none",
    "data.cache": "give a folder on a local disk, or null for none",
    "checkpoint.resume": "the default is auto",
    "checkpoint.init_from": "give a model folder or a checkpoint, or null for random weights",
}
"""Text settings that must not be empty, and the way out."""

_COMPOSE_SWITCHES = ("pre", "post", "query_wise", "key_wise", "low_rank", "gates")
"""Three pairs: with both switches of a pair off, compose does nothing."""


def check_config(config: Config, world_size: int | None = None) -> list[Problem]:
    """Returns all problems of a config, in the order of the schema; an empty list if it is valid.

    Args:
        config: the config.
        world_size: number of ranks; None skips the check that the batch can be divided among them.

    Raises:
        ValueError: ``world_size`` is below 1.
    """
    if world_size is not None and world_size < 1:
        raise ValueError(f"world_size is {world_size}: it must be at least 1, or None if it is not known")
    problems = [Problem(path, get(config, path), rule, fix) for path, rule, fix in _single_values(config)]
    for reads, rule in [
        *_RULES,
        (frozenset({"train.global_batch_size"}), functools.partial(_batch_is_divisible, world_size=world_size)),
    ]:
        # A rule on a setting that is wrong in itself would only report a consequence, or fail.
        if not reads.intersection(problem.setting for problem in problems):
            problems += [Problem(path, get(config, path), text, fix) for path, text, fix in rule(config)]
    order = list(FIELDS)
    return sorted(problems, key=lambda problem: order.index(problem.setting))


Findings = Iterator[tuple[str, str, str]]
"""(path, rule, fix) of each violation."""

_RULES: list[tuple[frozenset[str], Callable[[Config], Findings]]] = []


def _rule(*reads: str) -> Callable:
    """Registers a rule between settings. It is skipped if one of the settings that it reads has a problem already."""

    def register(rule: Callable[[Config], Findings]) -> Callable[[Config], Findings]:
        _RULES.append((frozenset(reads), rule))
        return rule

    return register


def _single_values(config: Config) -> Findings:
    """Checks each setting by itself: type, choices, range, empty text."""
    for path, field in FIELDS.items():
        value, fix = get(config, path), f"the default is {show(field.default)}"
        if not has_type(value, field.type):
            yield path, f"must be {type_name(field.type)}", fix
        elif field.choices is not None and value not in field.choices:
            names = ", ".join(map(str, field.choices))
            yield path, f"must be one of {names}", choice_suggestion(field, value)
        elif field.range is not None:
            items = [f"{path}[{i}]" for i in range(len(value))] if isinstance(value, list) else [path]
            for item in items:
                number = get(config, item)
                if number is not None and (rule := violated(field.range, number)):
                    yield item, rule, fix
        elif path in _NEEDS_TEXT and value == "":
            yield path, "must not be empty", _NEEDS_TEXT[path]


@_rule("model.dim", "model.heads", "model.head_dim")
def _heads_divide_dim(config: Config) -> Findings:
    model = config.model
    if model.head_dim is None and model.dim % model.heads:
        rule = f"must divide model.dim = {model.dim} while model.head_dim is null"
        yield "model.heads", rule, f"use {_near_divisors(model.dim, model.heads)}, or set model.head_dim"


@_rule("model.heads", "model.kv_heads")
def _kv_heads_divide_heads(config: Config) -> Findings:
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if kv_heads is not None and heads % kv_heads:
        fix = f"use {_near_divisors(heads, kv_heads)}, or null for as many as heads"
        yield "model.kv_heads", f"must divide model.heads = {heads}", fix


@_rule("model.dim", "model.heads", "model.head_dim", "model.rope_fraction")
def _rope_rotates_pairs(config: Config) -> Findings:
    model = config.model
    head_dim = model.head_dim or model.dim // model.heads
    count = int(model.rope_fraction * head_dim)
    if count < 2 or count % 2:
        rule = f"rotates {count} of the {head_dim} dimensions of a head, which must be an even number of at least 2"
        even = sorted({max(2, count - count % 2), max(2, count + count % 2)})
        fixes = [f"{_fraction(n, head_dim)} for {n} dimensions" for n in even if n <= head_dim]
        yield "model.rope_fraction", rule, f"use {' or '.join(fixes)}" if fixes else "use a head_dim of at least 2"


@_rule("model.rope_scaling.kind", "model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor")
def _rope_scaling_factors_are_ordered(config: Config) -> Findings:
    scaling = config.model.rope_scaling
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        rule = f"must be above model.rope_scaling.low_freq_factor = {scaling.low_freq_factor}"
        yield "model.rope_scaling.high_freq_factor", rule, "Llama 3 uses 1 and 4"


@_rule("model.ffn", "model.ffn_dim", "model.multi_gate")
def _multi_gate_divides_ffn(config: Config) -> Findings:
    model = config.model
    if model.multi_gate is None:
        return
    if model.ffn != "swiglu":
        yield "model.multi_gate", f"needs model.ffn=swiglu, but model.ffn is {model.ffn}", "set it to null"
    elif model.ffn_dim % model.multi_gate:
        fix = f"use {_near_divisors(model.ffn_dim, model.multi_gate)}, or null for none"
        yield "model.multi_gate", f"must divide model.ffn_dim = {model.ffn_dim}", fix


@_rule("model.windows", "model.layers")
def _windows_fit_layers(config: Config) -> Findings:
    windows, layers = config.model.windows, config.model.layers
    if not windows:
        yield "model.windows", "must not be empty", "use [null] for full attention in every layer"
    elif len(windows) > layers:
        rule = f"has {len(windows)} entries for model.layers = {layers}, so some would never be used"
        yield "model.windows", rule, f"use {show(windows[:layers])}"


@_rule("model.attention", *(f"model.compose.{name}" for name in _COMPOSE_SWITCHES))
def _compose_composes(config: Config) -> Findings:
    if config.model.attention != "dcmha":
        return
    for a, b in zip(_COMPOSE_SWITCHES[::2], _COMPOSE_SWITCHES[1::2]):
        if not getattr(config.model.compose, a) and not getattr(config.model.compose, b):
            fix = "turn one on, or set model.attention=mha for a plain Transformer"
            yield f"model.compose.{a}", f"{a} and {b} are both off, so compose would do nothing", fix


@_rule("data.train", "data.sources")
def _train_or_sources(config: Config) -> Findings:
    train, sources = config.data.train, config.data.sources
    if not train and not sources:
        yield "data.train", "must not be empty", f"{_SHARDS}, or several in data.sources"
    if train and sources:
        rule = f"must be empty while data.train is {show(train)}: a run reads one folder or a mixture"
        yield "data.sources", rule, "remove one; data.train='' overrides the value from a file"


@_rule("data.sources")
def _sources_are_complete(config: Config) -> Findings:
    names: dict[str, int] = {}
    for i, source in enumerate(config.data.sources):
        path = f"data.sources[{i}]"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source.name):
            yield (f"{path}.name", "must consist of letters, digits and ._-", "use a name such as web-2024")
        elif source.name in names:
            yield (
                f"{path}.name",
                f"is also the name of data.sources[{names[source.name]}]",
                "give each source its own name",
            )
        names.setdefault(source.name, i)
        if source.path == "":
            yield f"{path}.path", "must not be empty", _SHARDS
        if rule := violated(POSITIVE, source.weight):
            yield f"{path}.weight", rule, "weights are relative to each other; remove a source to use none of it"


@_rule("data.prefetch_steps", "data.workers")
def _workers_prefetch(config: Config) -> Findings:
    if config.data.workers > 0 and config.data.prefetch_steps == 0:
        fix = "use 0 to prepare batches in the training loop, or data.prefetch_steps of at least 1"
        yield "data.workers", "workers prefetch batches, but data.prefetch_steps is 0", fix


@_rule("data.cache", "data.verify")
def _cache_needs_checksums(config: Config) -> Findings:
    if config.data.cache is not None and not config.data.verify:
        rule = "identifies shards by their checksums, but data.verify is false"
        yield "data.cache", rule, "set it to null, or data.verify=true"


@_rule("data.train", "data.sources", "data.validation", "data.retry_total_seconds", "parallel.pause_timeout_minutes")
def _data_retries_end_before_timeout(config: Config) -> Findings:
    # While one rank retries a read, the others wait for it in a collective.
    most = 60 * config.parallel.pause_timeout_minutes / 2
    remote = any("://" in root for root in [*config.data.roots, config.data.validation or ""])
    if remote and config.data.retry_total_seconds > most:
        minutes = config.parallel.pause_timeout_minutes
        rule = f"must be at most half of parallel.pause_timeout_minutes = {minutes}, {most:g} s"
        why = "or the other ranks would time out before they receive the error of the data"
        yield "data.retry_total_seconds", f"{rule}, {why}", f"use at most {most:g}"


@_rule("data.validation", "validation.interval")
def _validation_has_data(config: Config) -> Findings:
    if config.validation.interval > 0 and config.data.validation is None:
        fix = "set data.validation to a folder of held-out shards, or this to 0"
        yield "validation.interval", "needs data.validation, which is null", fix


@_rule("checkpoint.keep_every", "checkpoint.interval")
def _keep_every_matches_interval(config: Config) -> Findings:
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    if every is not None and (interval == 0 or every % interval):
        rule = f"must be a multiple of checkpoint.interval = {interval}, or there is no checkpoint to keep"
        fix = (
            f"use {max(1, round(every / interval)) * interval}" if interval else "set checkpoint.interval, or use null"
        )
        yield "checkpoint.keep_every", rule, fix


@_rule("checkpoint.keep_best", "checkpoint.interval", "validation.interval")
def _keep_best_has_losses(config: Config) -> Findings:
    every, validated = config.checkpoint.interval, config.validation.interval
    if config.checkpoint.keep_best is None:
        return
    if not validated:
        fix = "set validation.interval to checkpoint.interval, or this to null"
        yield "checkpoint.keep_best", "needs validation, but validation.interval is 0", fix
    elif every == 0:
        rule = "needs checkpoints to choose from, but checkpoint.interval is 0"
        yield "checkpoint.keep_best", rule, f"set checkpoint.interval={validated}, or this to null"
    elif every % validated:
        rule = f"needs a validation at every checkpoint: checkpoint.interval = {every} must be a multiple of "
        fix = f"use checkpoint.interval={max(1, round(every / validated)) * validated}, or null"
        yield "checkpoint.keep_best", f"{rule}validation.interval = {validated}", fix


@_rule("samples.interval", "samples.prompts")
def _samples_have_prompts(config: Config) -> Findings:
    prompts = config.samples.prompts
    if config.samples.interval > 0 and (not prompts or "" in prompts):
        fix = 'give prompts, such as ["def "], or set samples.interval=0'
        yield "samples.prompts", "must hold at least one prompt, and no empty one", fix


def _batch_is_divisible(config: Config, world_size: int | None) -> Findings:
    size, ranks = config.train.global_batch_size, world_size or 1
    if size % ranks:
        lower = size - size % ranks
        sizes = f"{lower} or {lower + ranks}" if lower else str(ranks)
        rule = f"must be a multiple of the number of ranks, {ranks}"
        yield (
            "train.global_batch_size",
            rule,
            f"use {sizes}, or a number of ranks that divides it: {_near_divisors(size, ranks)}",
        )


@_rule("train.steps", "train.stop_after")
def _stop_is_within_run(config: Config) -> Findings:
    stop, steps = config.train.stop_after, config.train.steps
    if stop is not None and stop > steps:
        yield "train.stop_after", f"must be at most train.steps = {steps}", "set it to null to train to the end"


@_rule("log.profile_steps", "train.steps")
def _profiled_steps_are_in_run(config: Config) -> Findings:
    path, steps, last = "log.profile_steps", config.log.profile_steps, config.train.steps
    if steps != sorted(set(steps)):
        yield path, "must be ascending, each step once", f"use {show(sorted(set(steps)))}"
    elif steps and steps[-1] > last:
        yield path, f"must be at most train.steps = {last}", "leave out the later ones, or use [] for none"
    elif too_many := [n for n, m in zip(steps, steps[MOST_PROFILED_STEPS:]) if m - n == MOST_PROFILED_STEPS]:
        rule = f"has more than {MOST_PROFILED_STEPS} steps in a row, from {too_many[0]} on, which are one trace"
        yield path, rule, f"leave out {too_many[0] + MOST_PROFILED_STEPS}"


@_rule("parallel.offload_optimizer", "parallel.zero_stage")
def _offload_has_partitions(config: Config) -> Findings:
    if config.parallel.offload_optimizer and config.parallel.zero_stage == 0:
        fix = "set parallel.zero_stage=1, or parallel.offload_optimizer=false"
        yield "parallel.offload_optimizer", "must be false with parallel.zero_stage = 0, which cannot offload", fix


@_rule("optimizer.betas")
def _betas_are_two(config: Config) -> Findings:
    if len(config.optimizer.betas) != 2:
        yield "optimizer.betas", "must be two numbers", f"the default is {show(FIELDS['optimizer.betas'].default)}"


@_rule("optimizer.rules")
def _rules_are_complete(config: Config) -> Findings:
    for i, item in enumerate(config.optimizer.rules):
        path = f"optimizer.rules[{i}]"
        if item.match == "":
            yield f"{path}.match", "must not be empty", "give a pattern of parameter names, such as *.compose.*"
        if rule := violated(NOT_NEGATIVE, item.lr_scale):
            yield f"{path}.lr_scale", rule, "0 freezes the parameters, 1 changes nothing"
        if item.weight_decay is not None and (rule := violated(NOT_NEGATIVE, item.weight_decay)):
            yield f"{path}.weight_decay", rule, "0 is no decay, null changes nothing"


@_rule("train.steps", "schedule.kind", "schedule.warmup_steps", "schedule.decay_steps")
def _schedule_fits_steps(config: Config) -> Findings:
    schedule, steps = config.schedule, config.train.steps
    decay = 0
    if schedule.kind == "wsd":
        decay = steps // 5 if schedule.decay_steps is None else schedule.decay_steps
    elif schedule.decay_steps is not None:
        rule = f"is only used if schedule.kind is wsd, but it is {schedule.kind}"
        yield "schedule.decay_steps", rule, "set it to null, or schedule.kind=wsd"
    if decay > steps:
        yield "schedule.decay_steps", f"must be at most train.steps = {steps}", "use null for a fifth of the steps"
    elif schedule.warmup_steps + decay > steps:
        after = f" minus the {decay} steps of decay" if decay else ""
        rule = f"must be at most train.steps = {steps}{after}"
        yield "schedule.warmup_steps", rule, f"use at most {steps - decay}, or increase train.steps"


@_rule("checkpoint.resume", "checkpoint.init_from")
def _resume_or_init_from(config: Config) -> Findings:
    resume = config.checkpoint.resume
    if config.checkpoint.init_from is not None and resume not in ("auto", "never"):
        rule = f"is only for new runs, but checkpoint.resume = {show(resume)} resumes a run"
        yield "checkpoint.init_from", rule, "set only one of them, or checkpoint.resume=auto"


@_rule("run.name")
def _name_is_a_file_name(config: Config) -> Findings:
    if config.run.name in (".", "..") or re.search(r"[/\\\x00-\x1f]", config.run.name):
        yield "run.name", "must be usable as a folder name", "set the path with run.folder"


def violated(allowed: Range, number: float) -> str | None:
    """The rule that a number violates, or None."""
    if isinstance(number, int) and number.bit_length() > 63:
        return "must fit in 64 bits"
    if isinstance(number, float) and not math.isfinite(number):
        return "must be a finite number"
    return None if number in allowed else f"must be {allowed}"


def _near_divisors(number: int, near: int) -> str:
    """The closest divisors of ``number`` below and above ``near``; the upper one only if it is not far away."""
    below = (n for n in range(min(near - 1, number), 0, -1) if number % n == 0)
    above = (n for n in range(near + 1, min(near + 10_000, number) + 1) if number % n == 0)
    return " or ".join(str(n) for n in (next(below, None), next(above, None)) if n)


def _fraction(part: int, whole: int) -> float:
    """A fraction f such that int(f * whole) == part."""
    fraction = part / whole
    # part / whole may be rounded down, so that the product is just below part.
    return fraction if int(fraction * whole) == part else math.nextafter(fraction, 1)
