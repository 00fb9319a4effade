"""Folders to convert."""

import pytest

from dcscale.convert import convert
from dcscale.testing.convert import UpstreamFolder, write_checkpoint
from dcscale.testing.models import tiny_config


@pytest.fixture
def upstream_of(tmp_path):
    """Makes an upstream folder of a tiny model with these settings."""

    def make(**changes) -> UpstreamFolder:
        number = len(list(tmp_path.glob("made*")))
        own = write_checkpoint(tmp_path / f"made{number}", tiny_config(**changes))
        convert(own, tmp_path / f"made{number}-upstream", "upstream")
        return UpstreamFolder(tmp_path / f"made{number}-upstream")

    return make
