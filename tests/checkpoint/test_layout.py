"""Which checkpoints are complete or corrupt, and which one a path refers to."""

import json
import re

import pytest

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import FileRecord, corrupt_reason, incomplete_reason, seal, step_name, step_of


def make(run, step):
    folder = run / "checkpoints" / step_name(step)
    (folder / "optimizer").mkdir(parents=True)
    (folder / "optimizer" / "part").write_bytes(b"12345")
    seal(folder)
    return folder


def test_names_and_order(tmp_path):
    made = [make(tmp_path, step) for step in (100, 20, 123456789)]
    (tmp_path / "checkpoints" / ".unfinished-step-00000200").mkdir()
    (tmp_path / "checkpoints" / "step-7").mkdir()
    assert [p.name for p in checkpoints_of(tmp_path)] == ["step-00000020", "step-00000100", "step-123456789"]
    assert step_of(made[2]) == 123456789


def test_the_newest_complete_checkpoint_of_a_run(tmp_path):
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    assert find_checkpoint(tmp_path) == newer
    (newer / "optimizer" / "part").unlink()
    assert find_checkpoint(tmp_path) == older


def test_a_model_folder_may_have_any_name(tmp_path):
    folder = make(tmp_path, 1).rename(tmp_path / "model")
    assert find_checkpoint(folder) == folder


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda f: (f / "COMPLETE").unlink(), "COMPLETE is missing: the checkpoint was not finished"),
        (lambda f: (f / "COMPLETE").write_text("{"), "COMPLETE cannot be read: it is not JSON"),
        (
            lambda f: (f / "COMPLETE").write_text(json.dumps({"format": 99, "files": {}})),
            "format 99, this version of dcscale reads 2",
        ),
        (lambda f: (f / "COMPLETE").write_text("[1]"), "COMPLETE must be a JSON object, but is a list"),
        (lambda f: (f / "COMPLETE").write_text("{}"), "format None, this version of dcscale reads 2"),
        (lambda f: (f / "COMPLETE").write_text('{"format": 2}'), "has files None, but must map file names"),
        (lambda f: (f / "COMPLETE").write_text('{"format": 2, "files": ["a"]}'), r"has files \['a'\], but must map"),
        (
            lambda f: (f / "COMPLETE").write_text('{"format": 2, "files": {"a": {"bytes": 3}}}'),
            "must hold bytes and sha256 of a, but holds {'bytes': 3}",
        ),
        (
            lambda f: (f / "COMPLETE").write_text('{"format": 2, "files": {"a": {"bytes": Infinity, "sha256": "x"}}}'),
            "must hold bytes and sha256 of a, but holds {'bytes': inf",
        ),
        (
            lambda f: (f / "COMPLETE").write_text('{"format": 2, "files": {"../../a": {"bytes": 3, "sha256": "x"}}}'),
            "lists the file '../../a' outside its folder",
        ),
        (
            lambda f: seal(f, {"x" * 300: FileRecord(1, "")}),
            "xxx cannot be read: File name too long",  # as for a file without permission, or on a lost mount
        ),
        (lambda f: (f / "optimizer" / "part").unlink(), "part is missing"),
        (lambda f: (f / "optimizer" / "part").write_bytes(b"123"), "part has 3 bytes, 5 were written"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_with_the_reason(tmp_path, corrupt, message):
    folder = make(tmp_path, 3)
    assert incomplete_reason(folder) is None
    corrupt(folder)
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(folder)


def test_changed_content_is_found_by_its_checksum(tmp_path):
    folder = make(tmp_path, 3)
    assert corrupt_reason(folder) is None
    (folder / "optimizer" / "part").write_bytes(b"12346")
    assert incomplete_reason(folder) is None
    assert f"{folder}/optimizer/part has the SHA-256 " in corrupt_reason(folder)
    assert corrupt_reason(folder).endswith(
        "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5 was written: its content has changed"
    )
    assert corrupt_reason(folder, skip="optimizer") is None
    (folder / "optimizer" / "part").unlink()
    assert corrupt_reason(folder, skip="optimizer").endswith("part is missing")


def test_every_file_is_in_the_share_of_one_rank(tmp_path):
    folder = make(tmp_path, 3)
    for number in range(5):
        (folder / f"part-{number}").write_bytes(bytes(number))
    seal(folder)
    (folder / "part-3").write_bytes(b"abc")
    assert [corrupt_reason(folder, rank=rank, ranks=3) is None for rank in range(3)].count(False) == 1
    assert [corrupt_reason(folder, rank=rank, ranks=9) is None for rank in range(9)].count(False) == 1


def test_a_marker_that_is_a_folder(tmp_path):
    folder = make(tmp_path, 3)
    (folder / "COMPLETE").unlink()
    (folder / "COMPLETE").mkdir()
    assert "COMPLETE cannot be read" in incomplete_reason(folder)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: give a run folder or a step-XXXXXXXX"):
        find_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match="aaa cannot be accessed: File name too long; give a folder that can be read"
    ):
        find_checkpoint(tmp_path / ("a" * 300))


def test_not_a_checkpoint_name(tmp_path):
    with pytest.raises(CheckpointError, match="step-7 is not named like a checkpoint"):
        step_of(tmp_path / "step-7")


@pytest.mark.parametrize("name", ["COMPLETE", "optimizer/part"])
def test_a_disk_that_fails_does_not_make_a_checkpoint_corrupt(tmp_path, name):
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    (newer / "optimizer" / "part").write_bytes(b"")
    seal(newer)
    (newer / name).unlink()
    (newer / name).symlink_to("/proc/self/mem")  # its size is 0, and reading it is an input/output error
    message = f"{newer / name} cannot be read: Input/output error. The checkpoint may be intact: start again, or, if "
    with pytest.raises(CheckpointError, match=re.escape(message)) as failure:
        corrupt_reason(newer)
    assert failure.value.retry
    if name == "COMPLETE":
        with pytest.raises(CheckpointError, match=re.escape(message)):
            find_checkpoint(tmp_path)  # which would take the older one
    assert corrupt_reason(older) is None
