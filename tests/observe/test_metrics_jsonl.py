"""metrics.jsonl after crashes and resumes."""

import json

import pytest

from dcscale.observe import MetricsFile, read_metrics


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resume_removes_records_of_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0, pytest.fail)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
    first.close()
    second = MetricsFile(path, 3, pytest.fail)
    assert steps(path) == [1, 2, 3]
    second.write({"step": 4, "loss": 9.0})
    second.close()
    assert steps(path) == [1, 2, 3, 4]


def test_a_line_truncated_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    MetricsFile(path, 10, pytest.fail).close()
    assert steps(path) == [1]


def test_garbage_left_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n\xff\x00\n')
    MetricsFile(path, 10, pytest.fail).close()
    assert steps(path) == [1]


@pytest.mark.parametrize("line", ['{"epoch": 1}', '{"step": "one"}', "[1]"])
def test_a_file_of_something_else_is_left_unchanged(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 1: is not a record of a run: it has no integer"):
        MetricsFile(path, 0, pytest.fail)
    assert path.read_text() == line + "\n"


def test_a_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    MetricsFile(path, 0, pytest.fail).close()
    assert path.read_text() == ""


def test_records_of_a_step_are_merged_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, pytest.fail)
    file.write({"step": 1, "loss": 2.0})
    file.write({"step": 1, "validation_loss": 3.0})
    file.write({"step": 2, "loss": 1.0})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 2.0, "validation_loss": 3.0}, {"step": 2, "loss": 1.0}]


def test_metrics_that_belong_to_another_start_now_are_left_to_it(tmp_path):
    path, held = tmp_path / "metrics.jsonl", [True]

    def check():
        if not held[0]:
            raise RuntimeError("taken over")

    before = MetricsFile(path, 0, pytest.fail, check)
    held[0] = False
    path.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(RuntimeError, match="taken over"):
        before.write({"step": 1, "loss": 1.0})
    with pytest.raises(RuntimeError, match="taken over"):
        MetricsFile(path, 0, pytest.fail, check)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
