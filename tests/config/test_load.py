"""Loading: merging, reading of values, their origins, and round trips through YAML and dictionaries."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from dcscale.config import (
    Config,
    ConfigError,
    config_to_dict,
    differences,
    from_dict,
    load_arguments,
    load_config,
    to_yaml,
)
from dcscale.config.reference import FIELDS, get
from dcscale.config.schema import ComposeConfig, DataSource, ModelConfig, OptimizerRule


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def one(override: str) -> object:
    """The value that a single override sets."""
    return get(load_config([], [override]).config, override.partition("=")[0])


def test_no_files_give_the_defaults() -> None:
    loaded = load_config([])
    assert loaded.config == replace(Config(), run=loaded.config.run)
    assert loaded.config.run.folder == "runs/run"
    assert set(loaded.origins) == set(FIELDS)
    assert set(loaded.origins.values()) == {"default"}


def test_later_files_win_and_overrides_win_over_all(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "model:\n  dim: 64\n  compose:\n    rank: 1\n  layers: 2\ntrain:\n  steps: 5\n")
    second = write(tmp_path, "b.yaml", "# a comment\nmodel: {dim: 128, windows: [null]}\n")
    loaded = load_config([first, str(second)], ["train.steps=7", "train.steps=8"])
    model = loaded.config.model
    assert (model.dim, model.layers, model.compose.rank, model.windows) == (128, 2, 1, [None])
    assert loaded.config.train.steps == 8
    assert loaded.origins["model.dim"] == f"{second}:2"
    assert loaded.origins["model.layers"] == f"{first}:5"
    assert loaded.origins["model.compose.rank"] == f"{first}:4"
    assert loaded.origins["train.steps"] == "command line"
    assert loaded.origins["train.seed"] == "default"


def test_a_section_may_be_written_without_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model:\n  # dim: 64\ntrain: {}\n")
    assert load_config([path]).config.model == ModelConfig()


def test_a_whole_section_can_be_an_override() -> None:
    loaded = load_config([], ["model.compose={rank: 3, post: false}"])
    assert loaded.config.model.compose == ComposeConfig(rank=3, post=False)
    assert loaded.origins["model.compose.rank"] == "command line"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1E+2", 100.0),
        ("optimizer.learning_rate=.5", 0.5),
        ("optimizer.learning_rate=2.", 2.0),
        ("optimizer.learning_rate=1", 1.0),
        ("parallel.bucket_size=1_000_000", 1_000_000),
        ("train.seed=010", 10),
        ("train.steps='12'", 12),
        ("model.qk_norm=false", False),
        ("model.qk_norm=True", True),
        ("model.kv_heads=null", None),
        ("model.kv_heads=~", None),
        ("model.kv_heads=", None),
        ("data.train=", ""),
        ("data.validation=", None),
        ("data.validation='None'", "None"),
        ("model.kv_heads=4", 4),
        ("data.validation=null", None),
        ("data.validation='null'", "null"),
        ("model.windows=[256,null]", [256, None]),
        ("model.windows=[]", []),
        ("optimizer.betas=[0.9, 9e-1]", [0.9, 0.9]),
        ("run.name=two words, and more", "two words, and more"),
        ("run.name=a=b", "a=b"),
        ("run.name=1e3", "1e3"),
        ("run.name=007", "007"),
        ("run.name=no", "no"),
        ("run.name=true", "true"),
        ("run.name=12:30:00", "12:30:00"),
        ("run.name=2024-01-01", "2024-01-01"),
        ("run.name='# 1'", "# 1"),
        ("run.name=größe", "größe"),
        ('samples.prompts=["def ", no, 1.50, "a: b"]', ["def ", "no", "1.50", "a: b"]),
        ("log.peak_tflops=.inf", float("inf")),
        ("optimizer.rules=[]", []),
    ],
)
def test_values_are_read_as_intended(override: str, value: object) -> None:
    found = one(override)
    assert found == value
    assert type(found) is type(value)


def test_lists_of_settings(tmp_path: Path) -> None:
    text = """
optimizer:
  rules:
    - match: "*.compose.*"
      lr_scale: 5e-1
    - {match: embedding.weight, weight_decay: 0}
"""
    rules = [OptimizerRule("*.compose.*", 0.5), OptimizerRule("embedding.weight", weight_decay=0.0)]
    path = write(tmp_path, "a.yaml", text)
    assert load_config([path]).config.optimizer.rules == rules
    override = 'optimizer.rules=[{match: "*", lr_scale: "${optimizer.weight_decay}"}]'
    loaded = load_config([path], [override])
    assert loaded.config.optimizer.rules == [OptimizerRule("*", 0.1)]  # a list replaces the earlier one
    assert loaded.origins["optimizer.rules"] == "command line"


def test_an_item_of_a_list_is_changed_and_the_others_are_kept(tmp_path: Path) -> None:
    text = "data: {sources: [{name: web, path: a, weight: 3}, {name: '${run.name}', path: '007'}]}\n"
    path = write(tmp_path, "a.yaml", text)
    loaded = load_config([path], ["data.sources[0].weight=0.5", "data.sources[1].path=no", "model.windows[1]=8"])
    assert loaded.config.data.sources == [DataSource("web", "a", 0.5), DataSource("run", "no", 1.0)]
    assert loaded.config.model.windows == [256, 8]
    assert loaded.origins["data.sources"] == f"{path}:1, command line"
    assert loaded.origins["model.windows"] == "default, command line"
    replaced = load_config([path], ["data.sources[1]={name: code, path: c}", "data.sources[1].weight=2"])
    assert replaced.config.data.sources == [DataSource("web", "a", 3.0), DataSource("code", "c", 2.0)]


def test_references_are_resolved_in_every_kind_of_value(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.yaml",
        "run: {name: small, folder: 'out/${run.name}/${train.steps}'}\n"
        "train: {micro_batch_size: '${train.global_batch_size}'}\n"
        "model: {windows: ['${data.sequence_length}', null]}\n"
        "samples: {prompts: ['${run.folder}: ']}\n",
    )
    config = load_config([path], ["train.steps=3"]).config
    assert config.run.folder == "out/small/3"
    assert config.train.micro_batch_size == config.train.global_batch_size == 64
    assert config.model.windows == [1024, None]
    assert config.samples.prompts == ["out/small/3: "]


def test_a_literal_dollar_brace_is_escaped() -> None:
    assert one(r"run.name=\${oc.env:HOME}") == "${oc.env:HOME}"
    assert one(r"run.name=$HOME $x {y}") == "$HOME $x {y}"
    # What a reference yields is not resolved again.
    config = load_config([], [r"run.name=\${oc.env:HOME}", "data.train=${run.name}"]).config
    assert config.data.train == "${oc.env:HOME}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A home folder, and an environment variable whose value looks like a reference."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ODD", r"a\${run.name}$HOME")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs", "{home}/runs"),
        ("'~'", "{home}"),
        ("$HOME/runs", "{home}/runs"),
        ("/a$HOME/$HOME", "/a{home}/{home}"),
        ("$HOME/${run.name}", "{home}/run"),
        ("$ODD/x", r"a\${{run.name}}$HOME/x"),  # what a variable holds is taken as it is
        (r"\$HOME/runs", "$HOME/runs"),
        (r"\\$HOME", r"\{home}"),
        (r"\~/runs", "~/runs"),
        (r"\\~", r"\{home}"),
        ("a/~/b~", "a/~/b~"),
        ("$1/$", "$1/$"),
        (r"s3://a/\$HOME", "s3://a/$HOME"),
    ],
)
def test_paths_are_expanded_and_written_as_they_are_read(tmp_path: Path, home: str, text: str, path: str) -> None:
    settings = [
        "run.folder",
        "data.train",
        "data.validation",
        "data.cache",
        "checkpoint.resume",
        "checkpoint.init_from",
    ]
    config = load_config([], [f"{setting}={text}" for setting in settings]).config
    assert {get(config, setting) for setting in settings} == {path.format(home=home)}
    stored = write(tmp_path, "config.yaml", to_yaml(config))
    assert load_config([stored]).config == config
    assert load_config([stored], expand=False).config == config
    assert from_dict(config_to_dict(config)) == config


def test_paths_of_sources_are_expanded_once(home: str) -> None:
    sources = r"data.sources=[{name: $HOME, path: ~/a}, {name: b, path: x\$HOME}]"
    for more in ([], ["data.sources[0].weight=2"]):
        found = load_config([], [sources, *more]).config.data.sources
        assert [(source.name, source.path) for source in found] == [("$HOME", f"{home}/a"), ("b", "x$HOME")]


def test_other_text_is_not_expanded_and_nothing_is_in_a_stored_config(tmp_path: Path, home: str) -> None:
    config = load_config([], ["run.name=$HOME", "samples.prompts=[$HOME, ~/a]"]).config
    assert (config.run.name, config.samples.prompts) == ("$HOME", ["$HOME", "~/a"])
    stored = write(tmp_path, "config.yaml", "data: {train: $NOT_SET/a, cache: ~/b}\n")
    config = load_config([stored], expand=False).config
    assert (config.data.train, config.data.cache) == ("$NOT_SET/a", "~/b")


def test_arguments_are_files_or_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lr=3e-4,seed=1"
    folder.mkdir()
    write(folder, "config.yaml", "train: {seed: 1}\n")
    write(folder, "plain", "train: {steps: 2}\n")
    write(tmp_path, "run.name=b.yaml", "not read")
    arguments = [
        "run.name=b.yaml",
        f"{folder.name}/config.yaml",
        "data.train=a=b",
        f"{folder}/plain",
        "model.windows[0]=8",
    ]
    config = load_arguments(arguments).config
    assert (config.train.seed, config.train.steps, config.run.name, config.data.train) == (1, 2, "b.yaml", "a=b")
    assert config.model.windows == [8, None]


def random_text(generator: random.Random) -> str:
    pieces = [
        "${",
        "}",
        "\\",
        "$",
        "$HOME",
        "~",
        "run.name",
        "oc.env:HOME",
        "'",
        '"',
        "\n",
        " ",
        "#",
        ": ",
        "- ",
        "é",
        "\t",
        "%",
        "{",
        "[",
    ]
    pieces += [
        "null",
        "~",
        "1e3",
        "no",
        "0x1",
        "=",
        "*a",
        "&a",
        "!t",
        "|",
        ">",
        "@",
        "`",
        "\u2028",
        "\r",
        "\x00",
        "\x85",
        "😀",
        "a",
    ]
    return "".join(generator.choices(pieces, k=generator.randint(0, 8)))


@pytest.mark.parametrize("seed", range(25))
def test_yaml_and_dictionaries_lead_back_to_an_equal_config(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    config = Config()
    config.run.name, config.run.folder = random_text(generator), random_text(generator)
    config.data.validation = generator.choice([None, random_text(generator)])
    config.samples.prompts = [random_text(generator) for _ in range(generator.randint(0, 3))]
    config.model.windows = generator.choices([None, 1, 10**12], k=generator.randint(0, 4))
    config.optimizer.learning_rate = generator.choice([1e-30, 3e-4, 0.1, 1.0, 1e22, 5e-324])
    config.optimizer.rules = [OptimizerRule(random_text(generator), 1e-7, None), OptimizerRule("a", 2.0, 0.0)]
    config.train.compile = True
    path = write(tmp_path, "config.yaml", to_yaml(config))
    assert load_config([path]).config == config
    assert from_dict(config_to_dict(config)) == config


def test_the_written_yaml_is_readable() -> None:
    text = to_yaml(load_config([], ["model.windows=[256,null]", "optimizer.eps=1e-8"]).config)
    assert "  windows: [256, null]\n" in text
    assert "  prompts: ['def ']\n" in text
    assert text.index("run:") < text.index("model:") < text.index("  compose:\n    rank: 2\n") < text.index("log:")


def test_a_dictionary_may_lack_keys_but_not_have_unknown_ones() -> None:
    assert from_dict({"train": {"steps": 3}}).train.steps == 3
    assert from_dict({}) == Config(run=replace(Config().run, folder="runs/run"))
    with pytest.raises(ConfigError, match=r"train.stepz = 3 \(checkpoint\): unknown key; did you mean train.steps\?"):
        from_dict({"train": {"stepz": 3}}, source="checkpoint")
    with pytest.raises(ValueError, match=r"config\.json must be a mapping of sections, but is None"):
        from_dict(None, source="config.json")
    with pytest.raises(ConfigError, match=r'model.dim = "wide" \(dictionary\): must be int'):
        from_dict({"model": {"dim": "wide"}})


def test_differences_are_named_with_both_values() -> None:
    a, b = Config(), Config()
    assert differences(a, b) == []
    b.model.compose.rank, b.model.windows, b.train.steps = 4, [None], 1
    assert differences(a, b) == [
        ("model.windows", [256, None], [None]),
        ("model.compose.rank", 2, 4),
        ("train.steps", 1000, 1),
    ]
    assert differences(a.model, b.model) == [("windows", [256, None], [None]), ("compose.rank", 2, 4)]
    with pytest.raises(ValueError, match="the same class can be compared, not Config with ModelConfig"):
        differences(a, a.model)
