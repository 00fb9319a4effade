"""What a command imports when it starts: nothing slow before its arguments are parsed and ``--help`` is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcscale.cli import MODEL_DTYPES, MODEL_TARGETS
from dcscale.convert import DTYPES, TARGETS
from dcscale.ops.flash import assume_constant_result

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("tools/*.py"), ROOT / "launch" / "train.py"])
RUN = """
import json, runpy, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print()
print(json.dumps(list(sys.modules)))
"""
IMPORT = "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(list(sys.modules)))"


def modules_after(code: str, *arguments: str) -> tuple[str, set[str]]:
    """What a new process that runs ``code`` prints, and what is in its ``sys.modules`` in the end."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *output, modules = done.stdout.splitlines()
    return "\n".join(output), set(json.loads(modules))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_slow(command: str) -> None:
    output, modules = modules_after(RUN, command, "--help")
    assert output.startswith("usage: ")
    assert modules & {"torch", "numpy", "deepspeed", "transformers", "tokenizers", "webdataset", "matplotlib"} == set()


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("dcscale", {"torch", "numpy", "omegaconf"}),
        ("dcscale.config", {"torch", "numpy"}),
        ("dcscale.ops", {"torch._dynamo", "triton"}),
        ("dcscale.train", {"torch._dynamo", "deepspeed", "transformers", "tensorboard"}),
    ],
)
def test_an_import_imports_nothing_slow(module: str, slow: set[str]) -> None:
    assert modules_after(IMPORT, module)[1] & slow == set()


def test_the_command_line_imports_the_standard_library_only() -> None:
    before = modules_after(IMPORT, "json")[1]
    added = modules_after(IMPORT, "dcscale.cli")[1] - before - {"dcscale", "dcscale.cli"}
    assert {name.partition(".")[0] for name in added} <= sys.stdlib_module_names


def test_a_config_is_checked_without_dynamo_and_deepspeed(shards: Path) -> None:
    configs = ["configs/model/dcformer-405m.yaml", "configs/train/405m.yaml"]
    settings = [f"data.train={shards / 'train'}", "validation.interval=0"]
    output, modules = modules_after(RUN, "tools/check_config.py", *configs, *settings)
    assert "parameters         419,516,416, of which compose " in output
    assert "torch" in modules
    assert modules & {"torch._dynamo", "deepspeed", "transformers", "tensorboard"} == set()


def test_the_choices_of_the_command_line_are_those_of_the_conversion() -> None:
    assert set(MODEL_DTYPES) == set(DTYPES)
    assert set(MODEL_TARGETS) == set(TARGETS)


def test_constant_results_are_marked_as_torch_marks_them() -> None:
    marked, marked_by_torch = (
        mark(lambda: None) for mark in (assume_constant_result, torch.compiler.assume_constant_result)
    )
    assert vars(marked) == vars(marked_by_torch) != {}
