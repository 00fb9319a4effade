"""Every rule for single settings and between settings: what violates it, with which message, and what just passes."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from dcscale.config import Config, check_config, load_config
from dcscale.config.errors import show
from dcscale.config.reference import FIELDS, get
from dcscale.config.schema import DataConfig, OptimizerRule, ValidationConfig
from dcscale.config.schema.limits import Range

VALID = ["data.train=shards", "validation.interval=0"]


def config(*overrides: str) -> Config:
    return load_config([], [*VALID, *overrides]).config


def found(*overrides: str, world_size: int | None = None) -> list[str]:
    return [str(problem) for problem in check_config(config(*overrides), world_size)]


def config_with(path: str, value: object) -> Config:
    """A valid config, except perhaps for one value."""
    settings = Config(data=DataConfig(train="shards"), validation=ValidationConfig(interval=0))
    section, _, name = path.rpartition(".")
    setattr(get(settings, section), name, value)
    return settings


def scalar_types(hint: object) -> set[type]:
    return {hint} if isinstance(hint, type) else {t for a in typing.get_args(hint) for t in scalar_types(a)}


VIOLATIONS = [
    # Heads.
    (
        "model.dim=768; model.heads=10",
        "model.heads = 10: must divide model.dim = 768 while model.head_dim is null; "
        "use 8 or 12, or set model.head_dim",
    ),
    (
        "model.dim=7; model.heads=8",
        "model.heads = 8: must divide model.dim = 7 while model.head_dim is null; use 7, or",
    ),
    (
        "model.heads=12; model.kv_heads=5",
        "model.kv_heads = 5: must divide model.heads = 12; use 4 or 6, or null for as many as heads",
    ),
    ("model.kv_heads=24", "model.kv_heads = 24: must divide model.heads = 12; use 12, or null for as many as heads"),
    # RoPE: heads of 64.
    (
        "model.rope_fraction=0.02",
        "model.rope_fraction = 0.02: rotates 1 of the 64 dimensions of a head, which must be an even number of at "
        "least 2; use 0.03125 for 2 dimensions",
    ),
    (
        "model.rope_fraction=0.05",
        "rotates 3 of the 64 dimensions of a head, which must be an even number of at least 2; "
        "use 0.03125 for 2 dimensions or 0.0625 for 4 dimensions",
    ),
    (
        "model.rope_fraction=0.01",
        "rotates 0 of the 64 dimensions of a head, which must be an even number of at least 2; use 0.03",
    ),
    (
        "model.head_dim=5",
        "rotates 5 of the 5 dimensions of a head, which must be an even number of at least 2; use 0.8 for 4 dim",
    ),
    (
        "model.head_dim=1",
        "rotates 1 of the 1 dimensions of a head, which must be an even number of at least 2; use a head_dim of at",
    ),
    (
        "model.rope_scaling={kind: llama3, factor: 8, low_freq_factor: 4}",
        "model.rope_scaling.high_freq_factor = 4.0: must be above model.rope_scaling.low_freq_factor = 4.0; Llama 3",
    ),
    # Start of a run.
    (
        "checkpoint.resume=runs/a; checkpoint.init_from=models/b",
        'checkpoint.init_from = "models/b": is only for new runs, but checkpoint.resume = "runs/a" resumes a run',
    ),
    ("checkpoint.init_from=''", 'checkpoint.init_from = "": must not be empty; give a model folder or a checkpoint'),
    # Feed-forward network.
    (
        "model.ffn_dim=5632; model.multi_gate=43",
        "model.multi_gate = 43: must divide model.ffn_dim = 5632; use 32 or 44, or null for none",
    ),
    (
        "model.ffn=gelu; model.multi_gate=4",
        "model.multi_gate = 4: needs model.ffn=swiglu, but model.ffn is gelu; set it to null",
    ),
    # Windows.
    ("model.windows=[]", "model.windows = []: must not be empty; use [null] for full attention in every layer"),
    ("model.windows=[64,0]", "model.windows[1] = 0: must be at least 1; the default is [256, null]"),
    (
        "model.layers=2; model.windows=[8,null,16]",
        "model.windows = [8, null, 16]: has 3 entries for model.layers = 2, so some would never be used; use [8, null]",
    ),
    # Compose.
    (
        "model.compose={pre: false, post: false}",
        "model.compose.pre = false: pre and post are both off, so compose would do nothing; "
        "turn one on, or set model.attention=mha for a plain Transformer",
    ),
    (
        "model.compose={query_wise: false, key_wise: false}",
        "model.compose.query_wise = false: query_wise and key_wise are",
    ),
    (
        "model.compose={low_rank: false, gates: false}",
        "model.compose.low_rank = false: low_rank and gates are both off",
    ),
    # Data.
    (
        "data.train=''",
        'data.train = "": must not be empty; give a folder written by tools/make_shards.py, or several in',
    ),
    (
        "data.sources=[{name: a, path: b}]",
        'data.sources = [{"name": "a", "path": "b", "weight": 1.0}]: must be empty while data.train is "shards": a run '
        "reads one folder or a mixture; remove one; data.train='' overrides the value from a file",
    ),
    (
        "data.train=''; data.sources=[{path: b}]",
        'data.sources[0].name = "": must consist of letters, digits and ._-; use a name such as web-2024',
    ),
    ("data.train=''; data.sources=[{name: a/b, path: b}]", 'data.sources[0].name = "a/b": must consist of letters'),
    (
        "data.train=''; data.sources=[{name: a, path: b}, {name: a, path: c}]",
        'data.sources[1].name = "a": is also the name of data.sources[0]; give each source its own name',
    ),
    (
        "data.train=''; data.sources=[{name: a}]",
        'data.sources[0].path = "": must not be empty; give a folder written by tools/make_shards.py',
    ),
    (
        "data.train=''; data.sources=[{name: a, path: b, weight: 0}]",
        "data.sources[0].weight = 0.0: must be above 0; weights are relative to each other; remove a source",
    ),
    (
        "data.train=''; data.sources=[{name: a, path: b, weight: .inf}]",
        "data.sources[0].weight = Infinity: must be a finite number",
    ),
    (
        "data.workers=2; data.prefetch_steps=0",
        "data.workers = 2: workers prefetch batches, but data.prefetch_steps is 0; "
        "use 0 to prepare batches in the training loop, or data.prefetch_steps of at least 1",
    ),
    (
        "data.cache=cache; data.verify=false",
        'data.cache = "cache": identifies shards by their checksums, but data.verify is false; set it to null',
    ),
    ("data.cache=''", 'data.cache = "": must not be empty; give a folder on a local disk, or null for none'),
    (
        "data.train=s3://a/b; data.retry_total_seconds=601; parallel.pause_timeout_minutes=20",
        "data.retry_total_seconds = 601.0: must be at most half of parallel.pause_timeout_minutes = 20.0, 600 s, or "
        "the other ranks would time out before they receive the error of the data; use at most 600",
    ),
    (
        "data.validation=''",
        'data.validation = "": must not be empty; give a folder written by tools/make_shards.py, or',
    ),
    (
        "validation.interval=5",
        "validation.interval = 5: needs data.validation, which is null; "
        "set data.validation to a folder of held-out shards, or this to 0",
    ),
    (
        "samples.interval=5; samples.prompts=[]",
        "samples.prompts = []: must hold at least one prompt, and no empty one; "
        'give prompts, such as ["def "], or set samples.interval=0',
    ),
    (
        "checkpoint.keep_every=1500",
        "checkpoint.keep_every = 1500: must be a multiple of checkpoint.interval = 1000, or there is no checkpoint to "
        "keep; use 2000",
    ),
    (
        "checkpoint.interval=0; checkpoint.keep_every=10",
        "must be a multiple of checkpoint.interval = 0, or there is no checkpoint to keep; set checkpoint.interval",
    ),
    (
        "checkpoint.keep_best=2",
        "checkpoint.keep_best = 2: needs validation, but validation.interval is 0; set validation.interval to "
        "checkpoint.interval, or this to null",
    ),
    (
        "checkpoint.keep_best=2; validation.interval=300; data.validation=x",
        "needs a validation at every checkpoint: checkpoint.interval = 1000 must be a multiple of validation.interval "
        "= 300; use checkpoint.interval=900, or null",
    ),
    (
        "checkpoint.keep_best=2; checkpoint.interval=0; validation.interval=300; data.validation=x",
        "checkpoint.keep_best = 2: needs checkpoints to choose from, but checkpoint.interval is 0; set "
        "checkpoint.interval=300, or this to null",
    ),
    ("checkpoint.on_error=ignore", 'checkpoint.on_error = "ignore": must be one of fail, warn'),
    ("checkpoint.on_corrupt=skip", 'checkpoint.on_corrupt = "skip": must be one of fail, previous'),
    ("samples.interval=5; samples.prompts=[a,'']", 'samples.prompts = ["a", ""]: must hold at least one prompt'),
    # Training.
    (
        "train.stop_after=1001",
        "train.stop_after = 1001: must be at most train.steps = 1000; set it to null to train to",
    ),
    ("log.profile_steps=[3,2,3]", "log.profile_steps = [3, 2, 3]: must be ascending, each step once; use [2, 3]"),
    (
        "log.profile_steps=[1000,1001]",
        "log.profile_steps = [1000, 1001]: must be at most train.steps = 1000; leave out the later ones, or use []",
    ),
    (
        "log.profile_steps=[2,4,5,6,7,8,9,10,11,12,13,14]",
        "log.profile_steps = [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]: has more than 10 steps in a row, from 4 on, "
        "which are one trace; leave out 14",
    ),
    ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: must be two numbers; the default is [0.9, 0.95]"),
    ("optimizer.betas=[0.9,0.9,0.9]", "optimizer.betas = [0.9, 0.9, 0.9]: must be two numbers"),
    ("optimizer.betas=[0.9,1.0]", "optimizer.betas[1] = 1.0: must be in [0, 1); the default is [0.9, 0.95]"),
    ("optimizer.rules=[{}]", 'optimizer.rules[0].match = "": must not be empty; give a pattern of parameter names'),
    (
        "optimizer.rules=[{match: a},{match: b, lr_scale: -1}]",
        "optimizer.rules[1].lr_scale = -1.0: must be at least 0; 0 freezes the parameters, 1 changes nothing",
    ),
    (
        "optimizer.rules=[{match: a, weight_decay: .inf}]",
        "optimizer.rules[0].weight_decay = Infinity: must be a finite number; 0 is no decay, null changes nothing",
    ),
    # Schedule, over 1000 steps.
    (
        "schedule.warmup_steps=1001",
        "schedule.warmup_steps = 1001: must be at most train.steps = 1000; use at most 1000, or increase train.steps",
    ),
    (
        "schedule.kind=wsd; schedule.warmup_steps=801",
        "schedule.warmup_steps = 801: must be at most train.steps = 1000 minus the 200 steps of decay; use at most 800",
    ),
    (
        "schedule.kind=wsd; schedule.decay_steps=901",
        "schedule.warmup_steps = 100: must be at most train.steps = 1000 minus the 901 steps of decay; use at most 99",
    ),
    (
        "schedule.kind=wsd; schedule.decay_steps=1001",
        "schedule.decay_steps = 1001: must be at most train.steps = 1000; use null for a fifth of the steps",
    ),
    (
        "schedule.decay_steps=5",
        "schedule.decay_steps = 5: is only used if schedule.kind is wsd, but it is cosine; "
        "set it to null, or schedule.kind=wsd",
    ),
    # Names and choices.
    ("run.name=a/b", 'run.name = "a/b": must be usable as a folder name; set the path with run.folder'),
    (r"run.name=a\b", r'run.name = "a\\b": must be usable as a folder name'),
    ('run.name="a\\nb"', 'run.name = "a\\nb": must be usable as a folder name'),
    ("run.name=..", 'run.name = "..": must be usable as a folder name'),
    ("run.name=''", 'run.name = "": must not be empty; the default is run'),
    ("run.folder=''", 'run.folder = "": must not be empty; the default is runs/${run.name}'),
    ("checkpoint.resume=''", 'checkpoint.resume = "": must not be empty; the default is auto'),
    ("model.attention=dmha", 'model.attention = "dmha": must be one of dcmha, mha; did you mean dcmha?'),
    (
        "train.precision=fp16",
        'train.precision = "fp16": must be one of bf16, fp32; float16 is not supported: it needs loss scaling, use bf',
    ),
    ("train.precision=bfloat16", 'train.precision = "bfloat16": must be one of bf16, fp32; did you mean bf16?'),
    ("train.precision=float32", 'train.precision = "float32": must be one of bf16, fp32; did you mean fp32?'),
    ("train.precision=bf32", 'train.precision = "bf32": must be one of bf16, fp32; did you mean fp32?'),
    ("schedule.kind=zzz", 'schedule.kind = "zzz": must be one of cosine, wsd, constant; the default is "cosine"'),
    ("parallel.zero_stage=4", "parallel.zero_stage = 4: must be one of 0, 1, 2, 3; the default is 1"),
    (
        "parallel.zero_stage=0; parallel.offload_optimizer=true",
        "parallel.offload_optimizer = true: must be false with parallel.zero_stage = 0, which cannot offload; set "
        "parallel.zero_stage=1, or parallel.offload_optimizer=false",
    ),
    ("optimizer.eps=.nan", "optimizer.eps = NaN: must be a finite number; the default is 1e-08"),
    (
        "optimizer.learning_rate=.inf",
        "optimizer.learning_rate = Infinity: must be a finite number; the default is 0.0003",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), VIOLATIONS, ids=[overrides for overrides, _ in VIOLATIONS])
def test_a_violated_rule(overrides: str, message: str) -> None:
    problems = found(*overrides.split("; "))
    assert len(problems) == 1
    assert message in problems[0]


VALID_OVERRIDES = [
    (),
    ("model.head_dim=80", "model.heads=7"),
    ("model.kv_heads=1",),
    ("model.kv_heads=12",),
    ("model.rope_fraction=0.03125",),
    ("model.ffn_dim=5632", "model.multi_gate=44"),
    ("model.ffn=gelu",),
    ("model.layers=3", "model.windows=[1,null,2]"),
    ("model.compose={post: false, key_wise: false, gates: false}",),
    ("model.attention=mha", "model.compose={pre: false, post: false, low_rank: false, gates: false}"),
    ("validation.interval=5", "data.validation=x"),
    ("samples.prompts=[]",),
    ("train.stop_after=1000",),
    ("log.profile_steps=[1,2,3,4,5,6,7,8,9,10,12,1000]",),
    ("optimizer.betas=[0,0]",),
    ("optimizer.rules=[{match: a, lr_scale: 0, weight_decay: 0}, {match: b}]",),
    ("data.train=''", "data.sources=[{name: a-1, path: b}, {name: b.2_, path: b, weight: 1e-9}]"),
    ("data.workers=2", "data.prefetch_steps=1"),
    ("data.cache=/tmp/cache",),
    ("data.verify=false",),
    ("data.train=s3://a/b", "data.retry_total_seconds=600", "parallel.pause_timeout_minutes=20"),
    ("data.retry_total_seconds=601", "parallel.pause_timeout_minutes=20"),
    ("schedule.warmup_steps=1000",),
    ("schedule.warmup_steps=0",),
    ("schedule.kind=wsd", "schedule.warmup_steps=800"),
    ("schedule.kind=wsd", "schedule.warmup_steps=0", "schedule.decay_steps=1000"),
    ("schedule.kind=constant",),
    ("run.name=a run, with.dots",),
    ("checkpoint.keep_last=null",),
    ("checkpoint.keep_every=3000",),
    ("checkpoint.keep_best=1", "validation.interval=500", "data.validation=x"),
    ("parallel.offload_optimizer=true",),
    ("train.seed=9223372036854775807",),
]


@pytest.mark.parametrize(
    "overrides", VALID_OVERRIDES, ids=[" ".join(overrides) or "defaults" for overrides in VALID_OVERRIDES]
)
def test_a_rule_that_is_met(overrides: tuple[str, ...]) -> None:
    assert found(*overrides) == []


def test_the_defaults_need_data_only() -> None:
    assert [problem.path for problem in check_config(Config())] == ["data.train", "validation.interval"]


@pytest.mark.parametrize(
    ("size", "ranks", "fix"),
    [
        (64, 3, "use 63 or 66, or a number of ranks that divides it: 2 or 4"),
        (2, 3, "use 3, or a number of ranks that divides it: 2"),
        (1, 8, "use 8, or a number of ranks that divides it: 1"),
        (64, 1, None),
        (64, 64, None),
    ],
)
def test_the_batch_is_divided_among_the_ranks(size: int, ranks: int, fix: str | None) -> None:
    message = f"train.global_batch_size = {size}: must be a multiple of the number of ranks, {ranks}; {fix}"
    assert found(f"train.global_batch_size={size}", world_size=ranks) == ([message] if fix else [])


@pytest.mark.parametrize(
    ("size", "micro", "ranks", "taken"),
    [
        (64, 8, 1, 8),  # a divisor: as it is
        (64, 8, 8, 8),
        (256, 8, 64, 4),  # more than a rank's share: the share
        (12, 8, 1, 6),  # no divisor: the next smaller one
        (64, 6, 8, 4),
        (7, 6, 1, 1),
        (3, 1, 3, 1),
    ],
)
def test_the_micro_batch_is_the_largest_divisor_of_a_ranks_share(size: int, micro: int, ranks: int, taken: int) -> None:
    settings = config(f"train.global_batch_size={size}", f"train.micro_batch_size={micro}")
    assert check_config(settings, ranks) == []
    assert settings.train.sequences_per_pass(ranks) == taken


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_size_below_1_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"world_size is {world_size}: it must be at least 1"):
        check_config(Config(), world_size)


# For every number: (refused values, allowed values) next to its bounds.
COUNTS = (
    "model.scratch_mib model.layers model.dim model.heads model.kv_heads model.head_dim model.ffn_dim "
    "model.multi_gate model.windows model.rope_scaling.original_length "
    "data.shuffle_shards data.slots data.read_threads data.cache_bytes "
    "train.steps train.stop_after train.max_skipped_updates train.global_batch_size train.micro_batch_size "
    "schedule.decay_steps parallel.bucket_size validation.sequences samples.new_tokens "
    "checkpoint.keep_last checkpoint.keep_every checkpoint.keep_best "
    "log.interval log.profile_steps"
)
FROM_ZERO = (
    "data.prefetch_steps data.workers data.read_ahead train.loss_chunk schedule.warmup_steps "
    "validation.interval samples.interval checkpoint.interval log.compose_interval parallel.param_persistence_threshold"
)
FROM_ZERO_FLOAT = "model.compose.gate_init train.gradient_clipping optimizer.weight_decay samples.temperature"
POSITIVE = (
    "model.norm_eps model.qk_norm_eps optimizer.learning_rate optimizer.eps log.peak_tflops "
    "train.stop_after_minutes train.spike_score checkpoint.interval_minutes "
    "data.timeout_seconds data.retry_backoff_seconds data.retry_total_seconds "
    "model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor"
)
BOUNDS = {
    **dict.fromkeys(COUNTS.split(), ([0, -1, 2**63], [1, 2**63 - 1])),
    **dict.fromkeys(FROM_ZERO.split(), ([-1, 10**400], [0, 1])),
    **dict.fromkeys(FROM_ZERO_FLOAT.split(), ([-1e-9, math.inf, math.nan], [0.0, 1e-9, 1e30])),
    **dict.fromkeys(POSITIVE.split(), ([0.0, -1e-9, math.inf, math.nan], [1e-9, 1e30])),
    "parallel.start_timeout_minutes": ([0.0, 525_600.1, math.nan], [1e-9, 525_600.0]),
    "parallel.hang_seconds": ([0.0, 31_536_001.0, math.nan], [1e-9, 31_536_000.0]),
    "parallel.pause_timeout_minutes": ([0.0, 525_600.1, math.nan], [1e-9, 525_600.0]),
    "model.compose.rank": ([0, 5], [1, 4]),
    "model.vocab_size": ([1, 2**31], [2, 2**31 - 1]),
    "model.rope_base": ([1.0, math.inf], [1.001, 500000.0]),
    "model.rope_fraction": ([0.0, 1.001], [1e-9, 1.0]),
    "model.rope_scaling.factor": ([0.999, math.inf], [1.0, 32.0]),
    "data.sequence_length": ([1], [2]),
    "data.max_skipped": ([-1e-9, 1.001, math.nan], [0.0, 1.0]),
    "train.seed": ([-1, 2**63], [0, 2**63 - 1]),
    "optimizer.betas": ([-1e-9, 1.0, math.nan], [0.0, 0.999]),
    "schedule.final_ratio": ([-1e-9, 1.001], [0.0, 1.0]),
    "samples.top_p": ([0.0, 1.001], [1e-9, 1.0]),
}


def test_every_number_has_bounds_and_every_rule_a_field() -> None:
    numbers = {path for path, field in FIELDS.items() if {int, float} & scalar_types(field.type)}
    few = {path: field.choices for path, field in FIELDS.items() if field.choices is not None}
    limited = {path for path, field in FIELDS.items() if field.range is not None}
    assert limited == set(BOUNDS) == numbers - set(few)
    assert all(FIELDS[path].default in allowed for path, allowed in few.items())


@pytest.mark.parametrize("path", BOUNDS)
def test_the_bounds_of_every_number(path: str) -> None:
    for values, refused in zip(BOUNDS[path], (True, False)):
        for value in values:
            in_list = isinstance(FIELDS[path].default, list)
            problems = check_config(config_with(path, [value, value] if in_list else value))
            rules = (
                "must be at least",
                "must be above",
                "must be in ",
                "must be a finite number",
                "must fit in 64 bits",
            )
            of_bounds = [p for p in problems if p.setting == path and p.rule.startswith(rules)]
            assert [p.path for p in of_bounds] == ([f"{path}[0]", f"{path}[1]"] if in_list else [path]) * refused
            assert all(p.fix == f"the default is {show(FIELDS[path].default)}" for p in of_bounds)


def test_a_config_made_in_python_is_checked_for_types_too() -> None:
    settings = config()
    settings.model.dim = "wide"  # type: ignore[assignment]
    settings.model.qk_norm = 1  # type: ignore[assignment]
    settings.train.steps = True
    settings.model.windows = (1, 2)  # type: ignore[assignment]
    settings.optimizer.rules = [OptimizerRule("a", lr_scale="2")]  # type: ignore[arg-type]
    settings.optimizer.betas = [0, 1.5]
    assert [f"{p.path} {p.rule}" for p in check_config(settings)] == [
        "model.dim must be int",
        "model.qk_norm must be bool",
        "model.windows must be list of (int or null)",
        "train.steps must be int",
        "optimizer.betas[1] must be in [0, 1)",
        "optimizer.rules must be list of {match: str, lr_scale: float, weight_decay: float or null}",
    ]


def test_all_problems_are_reported_at_once_in_the_order_of_the_schema() -> None:
    problems = check_config(
        config(
            *("run.name=a/b", "model.heads=5", "model.windows=[]", "model.compose.rank=9", "data.train=''"),
            *("train.global_batch_size=9", "optimizer.betas=[2]", "schedule.kind=x", "log.interval=0"),
        ),
        world_size=4,
    )
    paths = ["run.name", "model.heads", "model.windows", "model.compose.rank", "data.train", "train.global_batch_size"]
    assert [problem.path for problem in problems] == [*paths, "optimizer.betas[0]", "schedule.kind", "log.interval"]


def test_rules_that_read_an_invalid_value_are_skipped() -> None:
    assert [p.path for p in check_config(config("model.heads=0"))] == ["model.heads"]
    assert [p.path for p in check_config(config("model.dim=0", "train.micro_batch_size=0"))] == [
        "model.dim",
        "train.micro_batch_size",
    ]


def test_checking_changes_nothing() -> None:
    settings = config("model.heads=5", "run.name=a/b")
    before = dataclasses.asdict(settings)
    assert check_config(settings, 3) == check_config(settings, 3) != []
    assert dataclasses.asdict(settings) == before


def test_ranges_as_text() -> None:
    assert [str(Range(1)), str(Range(0, open_low=True)), str(Range(0, 1)), str(Range(0, 1, True, True))] == [
        "at least 1",
        "above 0",
        "in [0, 1]",
        "in (0, 1)",
    ]
