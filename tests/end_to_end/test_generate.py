"""tools/generate.py on the checkpoints of a run, and what it rejects."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from dcscale.checkpoint.layout import seal
from dcscale.convert import ConversionError
from dcscale.data import DataError, load_tokenizer
from dcscale.evaluation import open_trained
from dcscale.models import generate
from dcscale.observe import printable
from dcscale.testing.distributed import run_distributed
from dcscale.testing.models import tiny_config as tiny_model
from dcscale.testing.models import write_checkpoint
from dcscale.testing.runs import make_shards, tiny_config, train_all

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "generate.py"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """A ZeRO-3 run on 2 ranks in bfloat16 and a ZeRO-1 run in float32; both generate samples at the end."""
    folder = tmp_path_factory.mktemp("runs")
    shards = shutil.copytree(shards, folder / "shards")
    common = ["samples.interval=4", "samples.new_tokens=12", 'samples.prompts=["heads ","a"]', "checkpoint.interval=4"]
    configs = [
        tiny_config(folder / "zero3", shards, "parallel.zero_stage=3", "train.precision=bf16", *common),
        tiny_config(folder / "zero1", shards, "parallel.zero_stage=1", *common),
    ]
    run_distributed(train_all, 2, configs)
    shutil.rmtree(shards)  # the checkpoint must be sufficient
    return folder


@pytest.fixture
def call(caller, load_tool):
    return caller(load_tool("generate"))


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_the_checkpoint_generates_the_sample_of_the_training_run(runs, name):
    summary = json.loads((runs / name / "summary.json").read_text())
    trained = open_trained(runs / name)
    assert trained.step == 8
    model = trained.load(torch.device("cpu"))
    assert next(model.parameters()).dtype == (torch.bfloat16 if name == "zero3" else torch.float32)
    prompts = [trained.tokenizer.encode(text) for text in ("heads ", "a")]
    written = generate(model, prompts, 12, temperature=0.8, top_p=0.95, seed=0, stop_id=256)
    assert summary["sample"] == "heads " + trained.tokenizer.decode(written[0])


def test_the_tool(runs, call):
    arguments = [str(runs / "zero1"), "--prompt", "heads ", "--prompt", "a", "--new-tokens", "10", "--temperature", "0"]
    result = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("----\n") == 2
    assert "----\nheads " in result.stdout
    assert "is: dcscale training checkpoint " in result.stderr
    assert "step-00000008 (step 8)\n" in result.stderr
    assert re.search(r"^20 tokens in [0-9.]+ s, [0-9.,]+ tokens/s$", result.stderr, re.MULTILINE)
    assert call(*arguments)[:2] == (0, result.stdout)
    _, _, err = call(runs / "zero1" / "checkpoints" / "step-00000004", "--prompt", "heads ", "--new-tokens", 4)
    assert "(step 4)" in err


def test_generated_text_cannot_control_the_terminal(runs, call):
    code, written, _ = call(runs / "zero1", "--prompt", "a\x1b[2Jb", "--new-tokens", 4, "--temperature", 0)
    assert code == 0
    assert "----\na\\x1b[2Jb" in written
    assert "\x1b" not in written


def test_errors_of_the_tool(runs, tmp_path, call):
    diverged = tmp_path / "diverged" / "step-00000008"
    shutil.copytree(runs / "zero1" / "checkpoints" / "step-00000008", diverged)
    huge = shutil.copytree(diverged, tmp_path / "huge" / "step-00000008")
    overwrite_weights(diverged, float("nan"))
    overwrite_weights(huge, 1e15)
    changed = shutil.copytree(runs / "zero1" / "checkpoints" / "step-00000008", tmp_path / "changed" / "step-00000008")
    config = changed / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    for arguments, message in (
        ([tmp_path, "--prompt", "a"], "is not a model that can be converted"),
        ([tmp_path / ("a" * 300), "--prompt", "a"], "File name too long"),
        ([runs / "zero1", "--prompt", ""], "prompt 0 is empty"),
        ([runs / "zero1", "--prompt", "a", "--new-tokens", "0"], "--new-tokens: '0' must be a whole number"),
        ([runs / "zero1", "--prompt", "a", "--device", "abacus"], "--device: 'abacus' cannot be used: Expected one of"),
        ([runs / "zero1", "--prompt", "a", "--device", "meta"], "--device: 'meta' cannot be used: "),
        (
            [diverged, "--prompt", "a"],
            "has values that are not finite:\n  - embedding.weight  <-  embedding.weight: 8224 NaN",
        ),
        ([huge, "--prompt", "a"], "the model's logits are not finite"),
        ([changed, "--prompt", "a"], "the checkpoint is corrupt: "),
    ):
        code, written, err = call(*arguments)
        assert (code, written) == (2, "")
        assert message in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "weights" / "model-00001.safetensors").unlink(), "model-00001.safetensors is missing"),
        (
            lambda f: edit_file(f / "state.json", '"tokenizer"', '"other"'),
            r"has no tokenizer\.json: name one with --tokenizer, or 'byte'",
        ),
        (
            lambda f: edit_file(f / "config.yaml", "dim: 32", "dim: 64"),
            r"embedding\.weight has shape \[257, 32\], the config requires \[257, 64\]",
        ),
    ],
)
def test_an_incomplete_or_inconsistent_checkpoint(runs, tmp_path, change, message):
    folder = tmp_path / "step-00000008"
    shutil.copytree(runs / "zero1" / "checkpoints" / "step-00000008", folder)
    change(folder)
    with pytest.raises((ConversionError, DataError), match=message):
        assert open_trained(folder).tokenizer


def test_a_checkpoint_contains_its_tokenizer_json(llama_tokenizer, tmp_path):
    file = Path(shutil.copy(llama_tokenizer, tmp_path / "made-here.json"))
    shards = make_shards(tmp_path / "shards", tokenizer=file)
    run, definition = tmp_path / "run", file.read_bytes()
    sampling = ["samples.interval=4", "samples.new_tokens=12", 'samples.prompts=["heads are"]']
    run_distributed(train_all, 1, [tiny_config(run, shards, "model.vocab_size=340", "train.steps=4", *sampling)])
    shutil.rmtree(shards)  # the checkpoint must be sufficient
    file.unlink()

    trained = open_trained(run)
    assert (trained.folder / "tokenizer.json").read_bytes() == definition
    library = Tokenizer.from_file(str(llama_tokenizer))
    prompt = trained.tokenizer.encode("heads are")
    assert prompt == library.encode("heads are", add_special_tokens=False).ids
    assert trained.tokenizer.eos_id == library.token_to_id("</s>")
    (written,) = generate(
        trained.load(torch.device("cpu")), [prompt], 12, temperature=0.8, top_p=0.95, seed=0, stop_id=2
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sample"] == trained.tokenizer.decode(prompt + written)  # with the space before the first new word

    (trained.folder / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match=r"tokenizer\.json is missing"):
        open_trained(run)


def test_the_text_is_that_of_prompt_and_continuation_together(llama_tokenizer, tmp_path, call):
    folder = write_checkpoint(tmp_path / "model", tiny_model(vocab_size=340))
    arguments = ["--tokenizer", llama_tokenizer, "--begin-id", 1, "--new-tokens", 12, "--temperature", 0]
    code, written, err = call(folder, "--prompt", "Ann has a", "--prompt", "the", *arguments)
    assert code == 0, err
    tokenizer = load_tokenizer(llama_tokenizer)
    prompts = [tokenizer.encode(text) for text in ("Ann has a", "the")]
    model = open_trained(folder).load(torch.device("cpu"))
    new = generate(model, [[1, *ids] for ids in prompts], 12, temperature=0, top_p=1, seed=0, stop_id=2)
    texts = [tokenizer.decode(before + after) for before, after in zip(prompts, new)]
    assert written == "".join(f"----\n{printable(text)}\n" for text in texts)


def overwrite_weights(folder, value):
    """Sets every weight to ``value``."""
    for path in (folder / "weights").glob("*.safetensors"):
        save_file({name: torch.full_like(x, value) for name, x in load_file(path).items()}, path)
    (folder / "probe.safetensors").unlink()
    seal(folder)


def edit_file(path, old, new):
    """Edits a file of a checkpoint and updates the marker."""
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    seal(path.parent)
