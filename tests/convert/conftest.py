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
    """Upstream folders by the settings of their models, made once."""
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
    """Calls the tool in this process: its exit code, what it wrote, and what it told on stderr."""
    specification = importlib.util.spec_from_file_location("convert_tool", TOOL)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return lambda *words: (tool.main([str(word) for word in words]), *capsys.readouterr())


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory):
    """transformers copies modelling files to a place of its own, which shall not be the user's."""
    from transformers import dynamic_module_utils  # slow to import, and few need it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
