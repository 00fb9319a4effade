"""Fixtures that call tools in pytest's process."""

import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def load_tool():
    """A function that imports a tool by name, as a new module each time."""

    def load(name):
        specification = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def caller(capsys):
    """A function that turns a tool's module into a function that calls it and returns exit code, stdout and stderr."""

    def of(tool):
        def in_this_process(*arguments):
            try:
                code = tool.main([str(argument) for argument in arguments])
            except SystemExit as exit:  # argparse exits on invalid arguments
                code = exit.code
            return code, *capsys.readouterr()

        return in_this_process

    return of
