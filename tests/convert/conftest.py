"""Folders to convert."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from dcscale.convert import convert
from dcscale.testing.models import UpstreamFolder, tiny_config, write_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Upstream folders by the settings of their models, each made once."""
    return tmp_path_factory.mktemp("upstream"), {}


@pytest.fixture
def upstream_of(tmp_path, made):
    """A copy of the upstream folder of a tiny model with these settings."""
    root, folders = made

    def make(**changes) -> UpstreamFolder:
        key = repr(changes)
        if key not in folders:
            folders[key] = root / f"{len(folders)}-upstream"
            convert(write_checkpoint(root / f"{len(folders)}", tiny_config(**changes)), folders[key], "upstream")
        number = len(list(tmp_path.glob("given*")))
        return UpstreamFolder(shutil.copytree(folders[key], tmp_path / f"given{number}"))

    return make


@pytest.fixture
def call(capsys):
    """Calls the tool in this process; returns its exit code, stdout and stderr."""
    specification = importlib.util.spec_from_file_location("convert_tool", TOOL)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return lambda *arguments: (tool.main([str(argument) for argument in arguments]), *capsys.readouterr())


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory):
    """Keeps the modelling files that transformers copies out of the user's cache."""
    from transformers import dynamic_module_utils  # slow to import, and few need it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
