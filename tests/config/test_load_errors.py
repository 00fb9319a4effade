"""Load errors: reported with path, value, origin, rule and the way out; all at once."""

from __future__ import annotations

import os
import pickle
import random
import string
from pathlib import Path

import pytest

from dcscale.config import ConfigError, Problem, load_arguments, load_config, raise_problems
from dcscale.config.reference import FIELDS, SECTIONS


def problems_of(files: list, overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    assert str(caught.value).count("\n") == len(caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


CLI = "(command line)"
OVERRIDES = [
    # Unknown keys: the same name in another section, a typing error, a wrong section, a key in a value, no suggestion.
    ("steps=10", f"steps = 10 {CLI}: unknown key; did you mean train.steps?"),
    ("rank=3", f"rank = 3 {CLI}: unknown key; did you mean model.compose.rank?"),
    ("model.rank=3", f"model.rank = 3 {CLI}: unknown key; did you mean model.compose.rank?"),
    ("train.stepz=10", f"train.stepz = 10 {CLI}: unknown key; did you mean train.steps?"),
    ("modle.layer=1", f"modle.layer = 1 {CLI}: unknown key; did you mean model.layers?"),
    ("trian={steps: 3}", f'trian = {{"steps": 3}} {CLI}: unknown key; did you mean train?'),
    ("run.namf.x=1", f"run.namf.x = 1 {CLI}: unknown key; the keys of run are folder, name"),
    (
        "interval=1",
        f"interval = 1 {CLI}: unknown key; did you mean "
        "validation.interval or samples.interval or checkpoint.interval or log.interval?",
    ),
    ("run.qqq=1", f"run.qqq = 1 {CLI}: unknown key; the keys of run are folder, name"),
    (
        "=1",
        f" = 1 {CLI}: unknown key; the keys at the top are {', '.join(sorted(p for p in SECTIONS if '.' not in p))}",
    ),
    (
        "train.steps.x=1",
        f"train.steps.x = 1 {CLI}: unknown key; train.steps has no keys: set it itself, such as train.steps=1000",
    ),
    (
        "model.windows.0=1",
        f"model.windows.0 = 1 {CLI}: unknown key; model.windows has no keys: set it itself, such as model.windows=[",
    ),
    (
        "data.sources[0].weight=1",
        f"data.sources[0] = 1 {CLI}: there is no such item: data.sources has 0 so far; set the",
    ),
    (
        "model.windows[2]=1",
        f"model.windows[2] = 1 {CLI}: there is no such item: model.windows has 2 so far; set the",
    ),
    ("model.windows[0].x=1", f"model.windows[0].x = 1 {CLI}: unknown key; model.windows[0] is a single value"),
    ("model.windows[0]=x", f'model.windows = ["x", null] {CLI}: must be list of (int or null); the default is'),
    (
        "train.steps[0]=1",
        f"train.steps[0] = 1 {CLI}: there is no such item: train.steps has 0 so far",
    ),
    ("modle.windows[0]=1", f"modle.windows[0] = 1 {CLI}: unknown key; "),
    ("--steps", f"--steps {CLI}: is not of the form key=value; write, for example, train.steps=10"),
    # Names of other trainers.
    ("optimizer.lr=1e-3", f"optimizer.lr = 0.001 {CLI}: unknown key; did you mean optimizer.learning_rate?"),
    ("lr=1e-3", f"lr = 0.001 {CLI}: unknown key; did you mean optimizer.learning_rate?"),
    *(
        (
            f"{key}=8",
            "did you mean train.global_batch_size (sequences per optimizer step, over all ranks) or train.micro",
        )
        for key in ("train.batch_size", "data.batch_size", "batch_size")
    ),
    ("model.hidden_size=8", f"model.hidden_size = 8 {CLI}: unknown key; did you mean model.dim?"),
    ("model.d_model=8", f"model.d_model = 8 {CLI}: unknown key; did you mean model.dim?"),
    ("model.n_layers=8", f"model.n_layers = 8 {CLI}: unknown key; did you mean model.layers?"),
    ("model.seq_len=8", f"model.seq_len = 8 {CLI}: unknown key; did you mean data.sequence_length?"),
    ("train.max-steps=8", f"train.max-steps = 8 {CLI}: unknown key; did you mean train.steps?"),
    ("model.dropout=0", f"model.dropout = 0 {CLI}: unknown key; dcscale has no dropout"),
    ("train.epochs=3", f"train.epochs = 3 {CLI}: unknown key; the length of a run is train.steps; tools/check_config"),
    (
        "model.qqq=1",
        f"model.qqq = 1 {CLI}: unknown key; the keys of model are attention, backend, bias, compose, dim, ffn",
    ),
    # Paths.
    ("run.folder=$DCSCALE_NO/x", "the environment variable DCSCALE_NO is not set; write the path itself, or \\$ for a"),
    (
        "data.sources=[{path: $DCSCALE_NO}]",
        f'data.sources[0].path = "$DCSCALE_NO" {CLI}: the environment variable DCSCALE',
    ),
    ("data.train=~dcscale-no/x", "this machine has no user dcscale-no; write the path itself, or \\~ for a literal ~"),
    (
        "data.train=s3://a/$HOME",
        f"data.train {CLI}: is an address with an environment variable in it: a config must not send one to a server",
    ),
    ("data.sources=[{path: s3://a/$HOME}]", f"data.sources {CLI}: is an address with an environment variable in it"),
    (
        "run.folder=${HOME}/x",
        "refers to HOME, which is not a setting; an environment variable is written $HOME, and only",
    ),
    # Types.
    ("train.steps=ten", f'train.steps = "ten" {CLI}: must be int; the default is 1000'),
    ("train.steps=1.5", f"train.steps = 1.5 {CLI}: must be int; the default is 1000"),
    ("train.steps=true", f"train.steps = true {CLI}: must be int; the default is 1000"),
    ("train.steps=null", f"train.steps = null {CLI}: must be int; the default is 1000"),
    ("train.steps=[1]", f"train.steps = [1] {CLI}: must be int; the default is 1000"),
    ("train.steps={a: 1}", f'train.steps = {{"a": 1}} {CLI}: must be int; the default is 1000'),
    ("train.compile=5", f"train.compile = 5 {CLI}: must be bool; write true or false"),
    ("train.compile=3.5", f"train.compile = 3.5 {CLI}: must be bool; write true or false"),
    *(
        (f"train.compile={text}", f"train.compile = {shown} {CLI}: must be bool; write true or false")
        for text, shown in (("1", "1"), ("'1'", '"1"'), ("yes", '"yes"'), ("on", '"on"'), ("0", "0"), ("'0'", '"0"'))
    ),
    ("train.steps=1e4", f"train.steps = 10000.0 {CLI}: must be int; write 10000"),
    (
        "schedule.warmup_steps=0.01",
        f"schedule.warmup_steps = 0.01 {CLI}: must be int; it counts optimizer steps, not a fraction of train.steps",
    ),
    ("data.workers=0.5", f"data.workers = 0.5 {CLI}: must be int; the default is 0"),
    (
        "model.windows=[256,None]",
        f'model.windows = [256, "None"] {CLI}: must be list of (int or null); write [256, null]',
    ),
    ("model.kv_heads=None", f'model.kv_heads = "None" {CLI}: must be int or null; write null'),
    ("train.steps=None", f'train.steps = "None" {CLI}: must be int; the default is 1000'),
    ("data.validation=None", f'data.validation = "None" {CLI}: would be the text None; write null for none, or quote'),
    ("optimizer.eps=small", f'optimizer.eps = "small" {CLI}: must be float; the default is 1e-08'),
    ("model.kv_heads=few", f'model.kv_heads = "few" {CLI}: must be int or null; the default is null'),
    ("run.name=null", f'run.name = null {CLI}: must be str; the default is "run"'),
    ("run.name=a: b", f'run.name = {{"a": "b"}} {CLI}: must be str; the default is "run"'),
    ("run.name=[a]", f'run.name = ["a"] {CLI}: must be str; the default is "run"'),
    ("model.windows=256", f"model.windows = 256 {CLI}: must be list of (int or null); the default is [256, null]"),
    ("model.windows=null", f"model.windows = null {CLI}: must be list of (int or null); the default is [256, null]"),
    (
        "model.windows=[256,x]",
        f'model.windows = [256, "x"] {CLI}: must be list of (int or null); the default is [256, null]',
    ),
    (
        "optimizer.betas=[0.9,null]",
        f"optimizer.betas = [0.9, null] {CLI}: must be list of float; the default is [0.9, 0.95]",
    ),
    ("model.compose=2", f"model.compose = 2 {CLI}: must be a section; its keys are gate_init, gates,"),
    ("model.compose=[1]", f"model.compose = [1] {CLI}: must be a section; its keys are gate_init, gates,"),
    (
        "optimizer.rules=[3]",
        f"optimizer.rules = [3] {CLI}: must be list of {{match: str, lr_scale: float, weight_decay",
    ),
    (
        "optimizer.rules=[{match: a, lr_scale: x}]",
        f'optimizer.rules = [{{"match": "a", "lr_scale": "x"}}] {CLI}: must be list of',
    ),
    (
        "optimizer.rules=[{match: a}, {lrscale: 2}]",
        f"optimizer.rules[1].lrscale = 2 {CLI}: unknown key; did you mean lr_scale?",
    ),
    (
        "optimizer.rules=[{zzz: 2}]",
        f"optimizer.rules[0].zzz = 2 {CLI}: unknown key; the keys are match, lr_scale, weight_decay",
    ),
    # YAML.
    (
        "samples.prompts=[a",
        f'samples.prompts = "[a" {CLI}: invalid YAML: while parsing a flow sequence expected',
    ),
    ("run.name=%x", f'run.name = "%x" {CLI}: invalid YAML: expected'),
    ("run.name=*x", f'run.name = "*x" {CLI}: invalid YAML: * starts an alias, which is not supported: quote'),
    (
        "run.name=!!python/name:os.system x",
        "the tag tag:yaml.org,2002:python/name:os.system is not supported; put text",
    ),
    ("model=!!python/object:os.stat_result {dim: 1}", "python/object:os.stat_result is not supported"),
    ("data.train={a,b}/train", "; put text in quotes, and all of it in those of the shell: 'data.train=\"...\"'"),
    ("model={? [1] : 2}", "invalid YAML: a key must be a scalar"),
    ("model={dim: 1, dim: 2}", "invalid YAML: duplicate key dim, first in line 1"),
    ("run.name=\x07", "invalid YAML: unacceptable character #x0007"),
    (r'samples.prompts=["a\ud83d"]', r"invalid YAML: \ud83d is half of a surrogate pair: write the"),
    ("optimizer.learning_rate=1" + "0" * 400, "must be float"),
    *(("run.name=" + "[" * n + "]" * n, "invalid YAML: nested too deeply") for n in (101, 300, 100_000)),
    ("train.steps=" + "9" * 5000, "must be int; the default is 1000"),
    # References.
    ("run.name=???", f'run.name = "???" {CLI}: a value is missing; replace the ??? by a value'),
    ("samples.prompts=[a, '???']", f'samples.prompts[1] = "???" {CLI}: a value is missing; replace the ???'),
    (
        "run.name=${run.nam}",
        f'run.name = "${{run.nam}}" {CLI}: refers to run.nam, which is not a setting; did you mean run.n',
    ),
    ("train.steps=${train}", "refers to train, which is not a setting"),
    ("run.name=${run.name}", f"run.name {CLI}: cannot be resolved ("),
    ("run.name=${run.folder}", f"run.name {CLI}: cannot be resolved ("),
    ("train.steps=${data.sequence_length}${train.seed}.", "could not be converted to Integer); write the value itself"),
    ("optimizer.betas=${samples.prompts}", "optimizer.betas (command line): cannot be resolved (Value 'def "),
    ("train.steps=${model.windows}", "train.steps"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[text[:40] for text, _ in OVERRIDES])
def test_an_invalid_override(override: str, message: str) -> None:
    assert message in problems_of([], [override])[0]


RESOLVERS = [
    *("${oc.env:HOME}", "${oc.env:HOME,x}", "x${oc.env:PATH}y", "${oc.decode:'1'}", "${oc.create:{a:1}}", "${now:%Y}"),
    *(
        "${${run.name}}",
        "${oc.${run.name}:HOME}",
        "${run.name",
        "${}",
        "${ run.name }",
        "${.name}",
        r"\\${oc.env:HOME}",
    ),
    *("${run.name}${oc.env:HOME}", r"\${a}${oc.env:HOME}", "${oc.select:run.name}", "${run['name']}", "${:x}"),
]


@pytest.mark.parametrize("text", RESOLVERS)
@pytest.mark.parametrize(
    "override", ["run.name='{}'", "samples.prompts=[a, '{}']", "optimizer.rules=[{{match: '{}'}}]"]
)
def test_environment_variables_and_functions_cannot_be_used(override: str, text: str) -> None:
    override = override.format(text.replace("'", "''"))
    found = problems_of([], [override])
    assert (
        "only ${section.key} is resolved; environment variables and functions are not" in found[0]
        or ("${}" in text and "refers to , which is not a setting" in found[0])
        or ("${.name}" in text and "refers to .name, which is not a setting" in found[0])
    )
    assert os.environ["PATH"] not in found[0]


FILES = [
    ("train:\n  steps: ten\n", ":2): must be int; the default is 1000"),
    ("train:\n  steps: 1\n  stepz: 3\n", "train.stepz = 3 ({}:3): unknown key; did you mean train.steps?"),
    ("trian:\n  steps: 1\n", 'trian = {{"steps": 1}} ({}:2): unknown key; did you mean train?'),
    (
        "train.steps: 1\n",
        "train.steps = 1 ({}:1): unknown key; dotted keys are only for the command line: write a section",
    ),
    ("train: 5\n", "train = 5 ({}:1): must be a section; its keys are compile, global_batch_size"),
    ("model:\n  compose: [1, 2]\n", "model.compose = [1, 2] ({}:2): must be a section; its keys are gate_init"),
    ("<<: {train: {steps: 3}}\n", "<< = "),
    ("- a\n- b\n", '{}: must contain sections with keys; such as "train: {{steps: 10}}"'),
    ("just words\n", "{}: must contain sections with keys"),
    ("", "{}: must contain sections with keys"),
    ("# nothing\n", "{}: must contain sections with keys"),
    ("train:\n  steps: [1\nmodel: {}\n", "{}:3: invalid YAML: while parsing a flow sequence"),
    (
        "train: {steps: 1}\nmodel: {}\ntrain: {seed: 2}\n",
        "{}:3: invalid YAML: duplicate key train, first in line 1",
    ),
    ("train: &a {steps: 1}\nmodel: *a\n", "{}:2: invalid YAML: * starts an alias"),
    (
        "run: {name: !!python/object/apply:os.system [ls]}\n",
        "{}:1: invalid YAML: the tag tag:yaml.org,2002:python",
    ),
    (
        "a: 1\n---\nb: 2\n",
        "{}:2: invalid YAML: expected a single document in the stream but found another document",
    ),
    ("run:\n\tname: x\n", "{}:2: invalid YAML: while scanning for the next token found character '\\t'"),
    ("run: {name: \x00}\n", "{}: invalid YAML: unacceptable character #x0000"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[text[:20] for text, _ in FILES])
def test_an_invalid_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    found = problems_of([path], [])
    assert len(found) == 1
    assert message.format(path) in found[0]


def test_no_reference_carries_an_environment_variable_into_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCSCALE_SECRET", "secret")
    sources = "data.sources=[{name: a, path: 'https://a/${run.name}'}]"
    for overrides in (
        ["data.cache=$DCSCALE_SECRET", "run.name=${data.cache}", "data.train=https://a/${run.name}"],
        ["data.cache=$DCSCALE_SECRET", "run.name=${data.cache}", sources],
        ["run.name=https://a", "data.train=${run.name}/$DCSCALE_SECRET"],
    ):
        [found] = problems_of([], overrides)
        assert "is an address with an environment variable in it" in found
        assert "secret" not in found
    config = load_config(
        [], ["data.cache=$DCSCALE_SECRET", "data.cache=b", "data.train=https://a/${data.cache}"]
    ).config
    assert config.data.train == "https://a/b"


ARGUMENTS = [
    (["train.steps", "10"], f"train.steps {CLI}: is not of the form key=value; write train.steps=10"),
    (["train.steps"], f"train.steps {CLI}: is not of the form key=value; write train.steps=VALUE"),
    (["--train.steps=10"], f"--train.steps=10 {CLI}: a setting has no dashes; write train.steps=10"),
    (["--train.steps"], f"--train.steps {CLI}: a setting has no dashes; write train.steps=VALUE"),
    (["--steps=10"], f"--steps=10 {CLI}: is not an option; --help lists the options"),
    (
        ["data.train=a/train", "data.train=b/train"],
        f'data.train = "b/train" {CLI}: is given twice on the command line, first as "a/train"; keep one; if a shell '
        "expanded {a,b} into several arguments, put quotes around it",
    ),
    (
        ["train.steps=1", "train.steps=1"],
        f'train.steps = "1" {CLI}: is given twice on the command line, first as "1"; keep',
    ),
    (["model.windows[0]=1", "model.windows[0]=2"], "model.windows[0] = "),
    (
        ["lr=1/no.yaml"],
        "lr=1/no.yaml: there is no such file; the presets are in the folder configs. As a setting, lr is unknown",
    ),
    (["stepz=1"], f"stepz = 1 {CLI}: unknown key; did you mean train.steps?"),
    (
        ["trian.steps"],
        "trian.steps: there is no such file; the presets are in the folder configs, and settings are written key",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[" ".join(arguments) for arguments, _ in ARGUMENTS])
def test_an_invalid_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_arguments(arguments)
    assert [str(problem)[: len(message)] for problem in caught.value.problems] == [message]


def test_similar_files_are_suggested_for_missing_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "small.yaml").write_text("model: {dim: 8}\n")
    (tmp_path / "mine.yaml").write_text("model: {dim: 8}\n")
    missing = "there is no such file"
    assert problems_of(["smal.yml"], []) == [f"smal.yml: {missing}; did you mean configs/model/small.yaml?"]
    assert problems_of(["small"], []) == [f"small: {missing}; did you mean configs/model/small.yaml?"]
    assert problems_of(["mime.yaml"], []) == [f"mime.yaml: {missing}; did you mean mine.yaml?"]
    assert problems_of(["zzz/qqqqqqqqq"], []) == [
        f"zzz/qqqqqqqqq: {missing}; the presets are in the folder configs, and settings are written key=value"
    ]


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "a.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    folder, file = problems_of([tmp_path, binary], [])
    assert folder.startswith(f"{tmp_path}: cannot be read (")
    assert folder.endswith("; give a YAML file in UTF-8")
    assert file.startswith(f"{binary}: cannot be read ('utf-8' codec")


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train:\n  steps: ten\n  stepz: 1\nmodel:\n  compose: 1\n  dim: wide\n")
    (tmp_path / "b.yaml").write_text("train: {")
    found = problems_of([tmp_path / "a.yaml", tmp_path / "b.yaml", "c.yaml"], ["train.seed=x", "seed=1", "train.seed"])
    starts = ["train.steps", "train.stepz", "model.compose", "model.dim", f"{tmp_path}/b.yaml", "c.yaml"]
    starts += ["train.seed =", "seed", "train.seed ("]
    assert [text.startswith(start) for text, start in zip(found, starts, strict=True)] == [True] * 9


def test_a_wrong_value_is_reported_even_if_a_later_one_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {steps: ten}\n")
    assert len(problems_of([tmp_path / "a.yaml"], ["train.steps=10"])) == 1


def mistype(generator: random.Random, word: str) -> str:
    """One letter dropped, doubled, replaced or swapped with the next."""
    i = generator.randrange(len(word))
    letter = generator.choice(string.ascii_lowercase)
    kind = generator.randrange(4)
    if kind == 0:
        return word[:i] + word[i + 1 :]
    if kind == 1:
        return word[:i] + word[i] + word[i:]
    return word[:i] + letter + word[i + 1 :] if kind == 2 else word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]


@pytest.mark.parametrize("seed", range(8))
def test_mistyped_keys_always_get_a_suggestion_or_the_list_of_keys(seed: int) -> None:
    generator = random.Random(seed)
    known = {*FIELDS, *SECTIONS}
    typed = {}
    for path in FIELDS:
        parts = path.split(".")
        i = generator.randrange(len(parts))
        parts[i] = mistype(generator, parts[i])
        if ".".join(parts) not in known:
            typed[".".join(parts)] = path
    found = problems_of([], [f"{path}=1" for path in typed])
    right = 0
    for (path, meant), problem in zip(typed.items(), found, strict=True):
        assert problem.startswith(f"{path} = 1 (command line): unknown key; ")
        fix = problem.partition("; ")[2]
        assert fix.startswith(("did you mean ", "the keys of ", "the keys at the top are "))
        named = fix.removeprefix("did you mean ").rstrip("?").split(" or ")
        assert fix.startswith("the keys ") or set(named) <= known
        right += meant in named or ("." in meant and meant.rpartition(".")[2] in fix)
    assert right >= 0.9 * len(typed)


def test_problems_carry_origins_and_survive_a_process_boundary() -> None:
    raise_problems([])
    problems = [Problem("model.windows[1]", 0, "must be at least 1", "x"), Problem("a", None, "is bad", "y", "here")]
    with pytest.raises(ConfigError) as caught:
        raise_problems(problems, {"model.windows": "a.yaml:3", "a": "there"})
    text = (
        "the config has 2 problems:\n  - model.windows[1] = 0 (a.yaml:3): must be at least 1; x\n"
        "  - a = null (here): is bad; y"
    )
    assert str(caught.value) == text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match="the config has a problem:\n  - a"):
        raise_problems(problems[1:])
