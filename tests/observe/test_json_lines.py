"""Files of JSON lines on a disk that fails, and after a kill."""

import errno
import json
import threading

import pytest

from dcscale.observe.json_lines import JsonLines


class FailingFile:
    """A file on a disk that takes ``disk.room`` more bytes, and then fails with ``disk.error``."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        if self._disk.room == 0:
            raise OSError(self._disk.error, "the reason")
        taken = self._file.write(bytes(data)[: self._disk.room])
        self._disk.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self._file, name)


class Disk:
    def __init__(self, room=10**9, error=errno.ENOSPC):
        self.room, self.error, self.opened = room, error, 0

    def open(self, path):
        self.opened += 1
        return FailingFile(path.open("a+b", buffering=0), self)


def numbers(path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_each_line_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "new" / "folder" / "a.jsonl"
    lines = JsonLines(path, pytest.fail)
    for n in range(3):
        lines.write({"n": n})
        assert numbers(path) == list(range(n + 1))
        assert lines.size == path.stat().st_size
    lines.close()
    again = JsonLines(path, pytest.fail)
    again.write({"n": 3})
    assert numbers(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_reported_once_and_loses_nothing(tmp_path, error):
    path, said, disk = tmp_path / "a.jsonl", [], Disk(error=error)
    lines = JsonLines(path, said.append, open_file=disk.open)
    lines.write({"n": 0})
    disk.room = 12  # a line and the beginning of the next one
    for n in range(1, 6):
        lines.write({"n": n})
        assert path.read_text() == '{"n": 0}\n{"n": 1}\n'
    assert said == [
        f"{path} cannot be written: the reason. Training continues; lines are kept in memory until they can be written"
    ]
    disk.room = 10**9
    lines.write({"n": 6})
    assert numbers(path) == list(range(7))
    assert said[1:] == [f"{path} can be written again"]
    assert disk.opened > 1  # a stale handle stays stale
    lines.close()
    assert len(said) == 2


def test_lines_beyond_the_bound_are_lost_and_counted(tmp_path):
    path, said, disk = tmp_path / "a.jsonl", [], Disk(room=0)
    lines = JsonLines(path, said.append, most_pending=3, open_file=disk.open)
    for n in range(5):
        lines.write({"n": n})
    disk.room = 10**9
    lines.write({"n": 5})
    assert numbers(path) == [3, 4, 5]
    assert said[-1] == f"{path} can be written again, but the oldest 3 lines are lost"


def test_lines_that_are_lost_at_the_end_are_reported(tmp_path):
    said, disk = [], Disk(room=0)
    lines = JsonLines(tmp_path / "a.jsonl", said.append, open_file=disk.open)
    lines.write({"n": 0})
    lines.write({"n": 1})
    lines.close()
    assert said[1:] == [f"2 lines could not be written to {tmp_path / 'a.jsonl'} and are lost"]


def test_a_file_without_lines_is_not_created(tmp_path):
    JsonLines(tmp_path / "a.jsonl", pytest.fail).close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_disk_that_fails(tmp_path):
    (tmp_path / "events").write_text("not a folder")
    said = []
    lines = JsonLines(tmp_path / "events" / "a.jsonl", said.append)
    lines.write({"n": 0})
    (tmp_path / "events").unlink()
    lines.write({"n": 1})
    assert numbers(tmp_path / "events" / "a.jsonl") == [0, 1]
    assert len(said) == 2


@pytest.mark.parametrize("left", ["", '{"n": 0}\n', '{"n": 0}\n{"n": ', '{"n'])
@pytest.mark.parametrize("length", [0, 200_000])
def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path, left, length):
    path = tmp_path / "a.jsonl"
    complete = left[: left.rfind("\n") + 1]
    path.write_text(left + "x" * length * (left != complete))
    lines = JsonLines(path, pytest.fail)
    lines.write({"n": 1})
    assert path.read_text() == complete + '{"n": 1}\n'
    assert lines.size == path.stat().st_size


def test_a_full_disk(small_disk):
    path, said = small_disk.folder / "a.jsonl", []
    lines = JsonLines(path, said.append)
    lines.write({"n": 0})
    small_disk.fill()
    for n in range(1, 1000):  # some fit into the last page
        lines.write({"n": n})
    assert "No space left on device" in said[0]
    small_disk.make_room()
    lines.write({"n": 1000})
    assert numbers(path) == list(range(1001))
    assert len(said) == 2


def test_a_file_that_belongs_to_another_process_now_is_not_opened_again(tmp_path):
    path, disk, mine = tmp_path / "a.jsonl", Disk(), [True]

    def check():
        if not mine[0]:
            raise RuntimeError("taken over")

    lines = JsonLines(path, lambda text: None, before_opening=check, open_file=disk.open)
    lines.write({"n": 0})
    disk.room = 0
    lines.write({"n": 1})
    disk.room, mine[0] = 10**9, False
    path.unlink()
    path.write_text('{"n": "of the other", "not yet')
    with pytest.raises(RuntimeError, match="taken over"):
        lines.write({"n": 2})
    with pytest.raises(RuntimeError, match="taken over"):
        lines.close()
    assert path.read_text() == '{"n": "of the other", "not yet'


def test_a_rewrite_keeps_what_is_chosen_and_appending_continues(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = JsonLines(path, pytest.fail)
    for n in range(4):
        lines.write({"n": n})
    lines.replace(lambda old: old[2:])
    lines.write({"n": 4})
    assert numbers(path) == [2, 3, 4]
    assert lines.size == path.stat().st_size


def test_several_threads_write_whole_lines(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl", pytest.fail)
    threads = [
        threading.Thread(target=lambda start=start: [lines.write({"n": start + n}) for n in range(50)])
        for start in (0, 50, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(tmp_path / "a.jsonl")) == list(range(150))


def test_infinities_and_nan_are_strings_and_other_objects_an_error(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl", pytest.fail)
    lines.write({"loss": float("nan"), "norms": [float("inf"), 1.5, (-float("inf"),)], "more": {"x": float("nan")}})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "loss": "nan",
        "norms": ["inf", 1.5, ["-inf"]],
        "more": {"x": "nan"},
    }
    with pytest.raises(TypeError, match="not JSON serializable"):
        lines.write({"path": tmp_path})
