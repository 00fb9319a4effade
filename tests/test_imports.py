"""The architecture, enforced: who may import whom, what is imported in one place only, and how long a file may be.

Imports are read with ast, so nothing is run; also those inside functions count. Only what stands under
``if TYPE_CHECKING:`` is left out.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = {"files", "cli", "hardware", "provenance", "lease", "signals"}
"""Modules and folders that know nothing of ours, and that everything above them may use."""

LOWER = {
    "config",
    "ops",
    "models",
    "data",
    "observe",
    "parallel",
    "checkpoint",
    "convert",
    "evaluation",
    "cluster",
    "doctor",
    "train",
    *BASE,
}
MAY_IMPORT = {
    **{name: set() for name in BASE},
    "cli": {"files"},
    "lease": {"files"},
    "signals": {"files"},
    "config": set(),
    "ops": set(),
    "models": {"config", "ops"},
    "data": {"config", "files", "lease", "signals"},
    "observe": {"config", "files"},
    "parallel": {"config", "ops", "files", "provenance"},
    "checkpoint": {"config", "parallel", "files", "lease"},
    "cluster": {"config", "data", "checkpoint", "parallel", "observe", *BASE},
    "doctor": {"config", "data", "checkpoint", "parallel", "observe", "cluster", *BASE},
    "convert": {"config", "ops", "models", "checkpoint", "files", "cli"},
    "evaluation": {"config", "ops", "models", "data", "checkpoint", "convert", "observe", "files", "cli"},
    "train": LOWER - {"convert", "evaluation", "train"},
    "testing": LOWER,
    "bench": {"config", "convert", "data", "models", "observe", "ops", "testing", *BASE},
}
"""Folder, or module, of the package: what of the package it may import besides itself and ``dcscale.__version__``."""

MAY_IMPORT_IN_DATA = {
    "errors": set(),
    "bad_rows": {"errors"},
    "storage": {"errors"},
    "shards": {"errors", "bad_rows", "storage", "tokenizers"},
    "tokenizers": {"errors", "storage", "shards"},
    "prepare": {"errors", "bad_rows", "storage", "shards", "tokenizers"},
    "stream": {"errors", "storage", "shards", "tokenizers"},
}
"""The same within ``dcscale.data``: making shards and reading them do not know each other."""

LIBRARIES = {"config": {"omegaconf", "yaml"}, "ops": {"torch", "triton", "flash_attn", "flash_attn_interface"}}
"""Folders that may use these libraries only, beside the standard library."""

ONE_HOME = {
    "deepspeed": "dcscale/parallel/engine.py",
    "webdataset": "dcscale/data/shards/shard.py",
    "tensorboard": "dcscale/observe/reporter.py",
    "tokenizers": "dcscale/data/tokenizers.py",
    "transformers": "dcscale/convert/formats/modeling_dcscale.py",
    "pyarrow": "dcscale/data/prepare/parquet.py",
    "requests": "dcscale/data/storage/http.py",
    "fsspec": "dcscale/data/storage/object_store.py",
    "braceexpand": "dcscale/data/storage/open.py",
    "flash_attn": "dcscale/ops/flash.py",
    "flash_attn_interface": "dcscale/ops/flash.py",
    "tensorstore": "dcscale/convert/formats/maxtext.py",
    "gguf": "dcscale/convert/formats/gguf.py",
    "matplotlib": "dcscale/bench/attention/report.py",
}
"""Libraries that one file of the package may import, beside the benchmarks that measure them."""

OTHERS = ("dcscale/bench/data/", "dcscale/bench/generate.py", "dcscale/bench/goodput/")

TOP_LEVEL = {
    *(".ci", ".github", ".gitignore", "LICENSE", "README.md", "pyproject.toml"),
    *("configs", "dcscale", "launch", "tests", "tools"),
}
MOST_LINES, MOST_LINES_OF_A_KERNEL = 500, 700
MOST_MODULES, MOST_FILES_IN_A_FOLDER = 256, 12
LEAST_LINES = 35
"""Of a module; a smaller one belongs to a neighbour. Package faces, errors, hooks and formats may be smaller."""

SMALL_BY_NATURE = ("__init__.py", "errors.py", "train/hooks/", "convert/formats/", "testing/starts.py")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name and file of every module of the package."""
    found = {}
    for path in sorted((root / "dcscale").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, name: str, known: dict[str, Path]) -> set[str]:
    """Dotted names that a file imports; of the package the very module, where ``from x import y`` names one."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _run_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known or inner == "torch.utils.tensorboard" else base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from _run_nodes(other)
        else:
            yield child
            yield from _run_nodes(child)


def violations(root: Path) -> list[str]:
    """Everything in the tree at ``root`` that breaks the architecture."""
    known = modules(root)
    graph = {name: imports(path, name, known) for name, path in known.items()}
    return [
        *_wrong_arrows(graph),
        *_wrong_libraries(graph, known, root),
        *_circles(graph),
        *_scripts(root),
        *_long_files(root),
    ]


def crowded(root: Path) -> list[str]:
    """Where the package has too many modules, crumbs, or folders in which nothing is found."""
    files = sorted((root / "dcscale").rglob("*.py"))
    found = []
    if len(files) > MOST_MODULES:
        found.append(f"dcscale has {len(files)} modules: {MOST_MODULES} are the most")
    for path in files:
        name, lines = path.relative_to(root).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        if lines < LEAST_LINES and not any(part in name for part in SMALL_BY_NATURE):
            found.append(f"{name} has {lines} lines: merge it with a neighbour")
    for folder in sorted({path.parent for path in files}):
        count = sum(path.parent == folder for path in files)
        if count > MOST_FILES_IN_A_FOLDER:
            found.append(f"{folder.relative_to(root)} has {count} files: {MOST_FILES_IN_A_FOLDER} are the most")
    return found


def _wrong_arrows(graph: dict[str, set[str]]) -> Iterator[str]:
    for name, imported in graph.items():
        if name == "dcscale":
            yield from (f"dcscale imports {other}: it is imported by all" for other in imported if _ours(other))
            continue
        folder = name.split(".")[1]
        if folder not in MAY_IMPORT:
            yield f"dcscale.{folder} is no part of the architecture"
            continue
        for other in sorted(imported):
            if other.split(".")[0] in ("launch", "tools", "tests"):
                yield f"{name} imports {other}: the package knows no scripts"
            elif _ours(other) and other != "dcscale":
                target = other.split(".")[1]
                if target != folder and target not in MAY_IMPORT[folder]:
                    yield f"{name} imports {other}: {folder} may not import {target}"
                if target == folder == "data" and name.count(".") > 1 and other.count(".") > 1:
                    here, there = name.split(".")[2], other.split(".")[2]
                    if here != there and there not in MAY_IMPORT_IN_DATA.get(here, {there}):
                        yield f"{name} imports {other}: data.{here} may not import data.{there}"


def _wrong_libraries(graph: dict[str, set[str]], known: dict[str, Path], root: Path) -> Iterator[str]:
    users: dict[str, list[str]] = {}
    for name, imported in graph.items():
        folder = name.split(".")[1] if "." in name else ""
        for other in sorted(imported):
            library = "tensorboard" if other.startswith("torch.utils.tensorboard") else other.split(".")[0]
            users.setdefault(library, []).append(known[name].relative_to(root).as_posix())
            if _ours(other) or library in sys.stdlib_module_names:
                continue
            if library not in LIBRARIES.get(folder, {library}):
                yield f"{name} imports {other}: {folder} may use {', '.join(sorted(LIBRARIES[folder]))} only"
    for library, home in ONE_HOME.items():
        files = sorted({file for file in users.get(library, []) if not file.startswith(OTHERS)})
        if files not in ([], [home]):
            yield f"{library} is imported in {', '.join(files)}: only {home} may"


def _circles(graph: dict[str, set[str]]) -> Iterator[str]:
    try:
        graphlib.TopologicalSorter({name: other & graph.keys() for name, other in graph.items()}).prepare()
    except graphlib.CycleError as error:
        yield f"a circle: {' <- '.join(error.args[1])}"


def _scripts(root: Path) -> Iterator[str]:
    """launch/ and tools/ stand on the package, not on each other or on tests."""
    names = {path.stem for folder in ("launch", "tools") for path in (root / folder).glob("*.py")}
    for folder in ("launch", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            for other in sorted(imports(path, path.stem, {})):
                if other.split(".")[0] in {"launch", "tools", "tests", *names}:
                    yield f"{folder}/{path.name} imports {other}: scripts import the package only"
                if other == "dcscale.testing" or other.startswith("dcscale.testing."):
                    yield f"{folder}/{path.name} imports {other}: that is for tests"


def _long_files(root: Path) -> Iterator[str]:
    for folder in ("dcscale", "launch", "tools", "tests"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".sh"):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                is_kernel = "triton" in path.as_posix() or path.name == "modeling_dcscale.py"
                most = MOST_LINES_OF_A_KERNEL if is_kernel else MOST_LINES
                if lines > most:
                    yield f"{path.relative_to(root).as_posix()} has {lines} lines: {most} are the most"


def _ours(name: str) -> bool:
    return name.split(".")[0] == "dcscale"


def unknown_entries(names: set[str]) -> list[str]:
    """What does not belong at the top of the repository."""
    return sorted(names - TOP_LEVEL)


def test_the_repository_keeps_to_the_architecture() -> None:
    assert violations(ROOT) == []


def test_no_folder_is_crowded_and_no_module_a_crumb() -> None:
    assert crowded(ROOT) == []


def test_crumbs_and_crowds_are_found(tmp_path: Path) -> None:
    plant(tmp_path, {f"dcscale/ops/a{number}.py": "\n" * 35 for number in range(13)} | {"dcscale/ops/b.py": "\n"})
    plant(tmp_path, {"dcscale/ops/__init__.py": "", "dcscale/train/hooks/a.py": "", "dcscale/data/errors.py": ""})
    assert crowded(tmp_path) == [
        "dcscale/ops/b.py has 1 lines: merge it with a neighbour",
        "dcscale/ops has 15 files: 12 are the most",
    ]


def test_the_top_of_the_repository_holds_what_belongs_there() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("only git knows which files belong to the repository and which are the user's")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert unknown_entries({line.partition("/")[0] for line in listing.splitlines()}) == []


def test_config_can_be_used_without_torch() -> None:
    code = "import sys, dcscale.config, dcscale.config.reference; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


BROKEN = [
    ({"dcscale/ops/a.py": "from dcscale.config import Config"}, "dcscale.ops.a imports dcscale.config: ops may not"),
    ({"dcscale/config/a.py": "import torch"}, "config may use omegaconf, yaml only"),
    ({"dcscale/config/a.py": "def f():\n    import torch.nn"}, "dcscale.config.a imports torch.nn"),
    ({"dcscale/ops/a.py": "import numpy"}, "ops may use flash_attn, flash_attn_interface, torch, triton only"),
    ({"dcscale/models/a.py": "import dcscale.train.b"}, "models may not import train"),
    ({"dcscale/models/sub/a.py": "from ...train import b"}, "models may not import train"),
    ({"dcscale/data/a.py": "from dcscale import train", "dcscale/train/__init__.py": ""}, "data may not import train"),
    ({"dcscale/data/a.py": "from ..parallel import Engine"}, "data may not import parallel"),
    ({"dcscale/train/a.py": "from dcscale.testing import b"}, "train may not import testing"),
    ({"dcscale/train/a.py": "import importlib\nimportlib.import_module('tools.b')"}, "the package knows no scripts"),
    ({"dcscale/train/a.py": "from launch import train"}, "the package knows no scripts"),
    ({"dcscale/train/a.py": "from tests.b import c"}, "the package knows no scripts"),
    ({"dcscale/data/prepare/a.py": "from dcscale.data.stream import b"}, "data.prepare may not import data.stream"),
    ({"dcscale/data/storage/a.py": "import dcscale.data.shards.b"}, "data.storage may not import data.shards"),
    ({"dcscale/misc/a.py": ""}, "dcscale.misc is no part of the architecture"),
    ({"dcscale/utils.py": ""}, "dcscale.utils is no part of the architecture"),
    ({"dcscale/__init__.py": "from dcscale.config import Config"}, "dcscale imports dcscale.config"),
    ({"dcscale/train/a.py": "import deepspeed"}, "deepspeed is imported in dcscale/train/a.py"),
    (
        {"dcscale/parallel/engine.py": "import deepspeed", "dcscale/parallel/b.py": "from deepspeed import zero"},
        "deepspeed is imported in dcscale/parallel/b.py, dcscale/parallel/engine.py",
    ),
    ({"dcscale/data/a.py": "import webdataset as wds"}, "only dcscale/data/shards/shard.py may"),
    (
        {"dcscale/train/a.py": "from torch.utils.tensorboard import SummaryWriter"},
        "only dcscale/observe/reporter.py may",
    ),
    ({"dcscale/train/a.py": "from torch.utils import tensorboard"}, "only dcscale/observe/reporter.py may"),
    ({"dcscale/train/a.py": "import tokenizers.models"}, "only dcscale/data/tokenizers.py may"),
    (
        {"dcscale/ops/flash.py": "import flash_attn", "dcscale/ops/b.py": "from flash_attn import flash_attn_func"},
        "flash_attn is imported in dcscale/ops/b.py, dcscale/ops/flash.py: only dcscale/ops/flash.py may",
    ),
    (
        {"dcscale/ops/a.py": "from dcscale.ops import b", "dcscale/ops/b.py": "def f():\n    from . import a"},
        "a circle: dcscale.ops.",
    ),
    (
        {"dcscale/ops/__init__.py": "from dcscale.ops.a import x", "dcscale/ops/a.py": "from dcscale.ops import y"},
        "circle",
    ),
    ({"tools/a.py": "import b", "tools/b.py": ""}, "tools/a.py imports b: scripts import the package only"),
    ({"launch/a.py": "from tools import b"}, "launch/a.py imports tools"),
    ({"tools/a.py": "from dcscale.testing import b"}, "that is for tests"),
    ({"dcscale/ops/a.py": "\n" * 501}, "dcscale/ops/a.py has 501 lines: 500 are the most"),
    ({"tests/ops/test_a.py": "\n" * 501}, "tests/ops/test_a.py has 501 lines"),
    ({"launch/a.sh": "\n" * 501}, "launch/a.sh has 501 lines"),
    ({"dcscale/ops/triton_a.py": "\n" * 701}, "dcscale/ops/triton_a.py has 701 lines: 700 are the most"),
]
ALLOWED = [
    {"dcscale/ops/triton_a.py": "\n" * 700, "dcscale/ops/a.py": "\n" * 500},
    {"dcscale/ops/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dcscale.train import b"},
    {"dcscale/train/a.py": "from dcscale import __version__", "dcscale/__init__.py": "__version__ = '1'"},
    {"dcscale/testing/a.py": "from dcscale.train import b\nfrom dcscale.config import c"},
    {"tools/a.py": "from dcscale.train import b\nimport deepspeed"},
    {"tests/test_a.py": "import deepspeed, webdataset\nfrom dcscale.testing import b"},
    {
        "dcscale/parallel/engine.py": "def f():\n    import deepspeed",
        "dcscale/ops/flash.py": "import flash_attn, triton",
    },
    {"dcscale/ops/__init__.py": "from dcscale.ops.a import x", "dcscale/ops/a.py": "from dcscale.ops.b import y"},
]


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(("files", "message"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_a_violation_is_found(tmp_path: Path, files: dict[str, str], message: str) -> None:
    plant(tmp_path, files)
    found = violations(tmp_path)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("files", ALLOWED, ids=[str(i) for i in range(len(ALLOWED))])
def test_what_is_allowed_is_not_reported(tmp_path: Path, files: dict[str, str]) -> None:
    plant(tmp_path, files)
    assert violations(tmp_path) == []


def test_every_violation_is_reported_at_once(tmp_path: Path) -> None:
    plant(tmp_path, {"dcscale/config/a.py": "import torch", "dcscale/ops/a.py": "import dcscale.data.b"})
    assert len(violations(tmp_path)) == 2


def test_a_stray_entry_at_the_top_is_found() -> None:
    assert unknown_entries({"dcscale", "README.md", "notes.txt", "src"}) == ["notes.txt", "src"]
