"""Event files: their format, their size, and reading them while they are written."""

import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from dcscale.observe.events import EVENTS, EventFile, event_path, read_events

PACKAGE = Path(__file__).parents[2] / "dcscale"


def test_an_event_has_a_kind_a_time_and_facts(tmp_path):
    path = event_path(tmp_path, 3)
    assert path == tmp_path / "events" / "rank-3.jsonl"
    EventFile(path, pytest.fail).write("straggler", rank=3, excess=0.125)
    (event,) = read_events(path)
    time = datetime.fromisoformat(event.pop("time"))
    assert timedelta(0) <= datetime.now(timezone.utc) - time < timedelta(minutes=1)
    assert event == {"event": "straggler", "rank": 3, "excess": 0.125}


def test_a_later_start_appends(tmp_path):
    for step in (1, 2):
        file = EventFile(tmp_path / "a.jsonl", pytest.fail)
        file.write("start", step=step)
        file.close()
    file.write("ending", code=0)  # also after it was closed
    assert [event["event"] for event in read_events(tmp_path / "a.jsonl")] == ["start", "start", "ending"]


def test_the_file_stays_small_and_loses_old_steps_first(tmp_path):
    path = tmp_path / "a.jsonl"
    file = EventFile(path, pytest.fail, most_bytes=4000)
    for step in range(300):
        file.write("steps", step=step)
        if step % 100 == 50:
            file.write("spike", step=step)
        assert path.stat().st_size < 4100
    events = read_events(path)
    assert [event["step"] for event in events if event["event"] == "spike"] == [50, 150, 250]
    steps = [event["step"] for event in events if event["event"] == "steps"]
    assert steps == list(range(steps[0], 300))
    assert len(steps) >= 20
    assert events == sorted(events, key=lambda event: event["step"])


def test_without_steps_the_oldest_events_go(tmp_path):
    file = EventFile(tmp_path / "a.jsonl", pytest.fail, most_bytes=2000)
    for step in range(100):
        file.write("spike", step=step)
    steps = [event["step"] for event in read_events(tmp_path / "a.jsonl")]
    assert steps == list(range(steps[0], 100))
    assert 10 < len(steps) < 30


def test_a_file_that_cannot_be_cut_grows_and_is_cut_later(small_disk):
    path, said = small_disk.folder / "a.jsonl", []
    file = EventFile(path, said.append, most_bytes=5000)
    line = {"text": "x" * 100}
    for _ in range(26):
        file.write("steps", **line)
    assert 4096 < path.stat().st_size < 5000
    small_disk.fill()  # the second block of the file has room, but a copy has none
    for _ in range(10):
        file.write("steps", **line)
    assert 5000 < path.stat().st_size < 8192
    (message,) = said
    assert re.fullmatch(rf"{re.escape(str(path))} has 5,\d+ bytes and cannot be cut: No space left on device", message)
    small_disk.make_room()
    for _ in range(20):
        file.write("steps", **line)
    assert path.stat().st_size < 5000
    assert len(said) == 1
    assert all(event["event"] == "steps" for event in read_events(path))


def test_a_reader_leaves_out_the_line_being_written_and_marks_what_is_no_event(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"event": "start", "step": 0}\n\x00\x00\n[1]\n{"step": 1}\n{"event": "st')
    start, *others = read_events(path)
    assert start == {"event": "start", "step": 0}
    assert [event["event"] for event in others] == ["unreadable"] * 3
    assert "a.jsonl, line 2 cannot be read: it is not JSON" in others[0]["error"]
    assert "a.jsonl, line 4: is not an event: it has no string 'event'" in others[2]["error"]


def test_every_kind_that_is_written_is_documented_and_the_other_way_round():
    written = set()
    for path in PACKAGE.rglob("*.py"):
        for kind in re.findall(r"\bevents\.write\(([^,]*),", path.read_text(encoding="utf-8")):
            written |= set(re.findall(r'"(\w+)"', kind))
    assert written == set(EVENTS)


def test_a_line_is_json_that_others_read(tmp_path):
    EventFile(tmp_path / "a.jsonl", pytest.fail).write("nonfinite", loss=float("nan"))
    strict = json.loads((tmp_path / "a.jsonl").read_text(), parse_constant=pytest.fail)
    assert strict["loss"] == "nan"
