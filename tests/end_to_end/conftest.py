"""Tools called in pytest's own process."""

import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def load_tool():
    """Gives a tool's name its module, made anew."""

    def load(name):
        specification = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def caller(capsys):
    """Gives a tool's module a function that calls it: its exit code, what it wrote, and what it told on stderr."""

    def of(tool):
        def in_this_process(*words):
            try:
                code = tool.main([str(word) for word in words])
            except SystemExit as exit:  # argparse's way to refuse
                code = exit.code
            return code, *capsys.readouterr()

        return in_this_process

    return of
