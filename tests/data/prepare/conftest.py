"""What the tests of several tools for data share."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def inspect_tool(capsys):
    """Runs the tool in this process, since starting another one takes seconds."""
    main = runpy.run_path(str(Path(__file__).parents[3] / "tools/inspect_shards.py"))["main"]

    def run(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run
