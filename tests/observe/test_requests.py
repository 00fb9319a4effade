"""Request files: what they may hold, when they are looked for, and that each is taken once."""

import os
import threading

import pytest

from dcscale.observe.requests import MEMORY, PROFILE, STACKS, Request, RequestError, RequestFiles, parse_request


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("", Request(PROFILE)),
        (" \n", Request(PROFILE, 3, frozenset([0]))),
        ("steps=5 ranks=0,3 memory stacks\n", Request(PROFILE, 5, frozenset([0, 3]), frozenset(["memory", "stacks"]))),
        ("shapes\nranks=1-2,7,7\tsteps=10", Request(PROFILE, 10, frozenset([1, 2, 7]), frozenset(["shapes"]))),
        ("ranks=all", Request(PROFILE, ranks=None)),
    ],
)
def test_a_request_that_is_understood(text, request_):
    assert parse_request(PROFILE, text, 8) == request_
    assert parse_request(PROFILE, request_.text, 8) == request_


def test_which_ranks_look():
    assert [Request(PROFILE).of_rank(rank) for rank in range(2)] == [True, False]
    assert Request(MEMORY, ranks=None).of_rank(1000)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (
            PROFILE,
            "setps=5",
            "'setps=5' is not a setting: leave the file empty, or write any of: steps=1 to 10; ranks=",
        ),
        (PROFILE, "steps", "'steps' is not a setting"),
        (PROFILE, "stacks=1", "'stacks=1' is not a setting"),
        (PROFILE, "steps=2 steps=2", "steps is given twice"),
        (PROFILE, "steps=0", "steps='0' is not possible: leave the file empty, or write any of: steps=1 to 10; "),
        (PROFILE, "steps=11", "steps='11' is not possible"),
        (PROFILE, "steps=-1", "steps='-1' is not possible"),
        (PROFILE, "steps=٣", r"steps='\\u0663' is not possible"),
        (PROFILE, f"steps={'9' * 4000}", "steps='9{60}...' is not possible"),
        (PROFILE, "ranks=", "ranks='' is not possible"),
        (PROFILE, "ranks=1,", "ranks='1,' is not possible"),
        (PROFILE, "ranks=8", "ranks='8': the ranks of this run are 0 to 7"),
        (PROFILE, "ranks=0-999999999", "ranks='0-999999999': the ranks of this run are 0 to 7"),
        (PROFILE, "ranks=3-2", "ranks='3-2': the ranks of this run are 0 to 7"),
        (MEMORY, "steps=2", "'steps=2' is not a setting: leave the file empty, or write any of: ranks="),
        (STACKS, "ranks=1", "'ranks=1' is not a setting: leave the file empty$"),
        (PROFILE, "\x1b[2Jevil\x00", r"'\\x1b\[2Jevil\\x00' is not a setting"),
    ],
)
def test_a_request_that_is_refused(kind, text, reason):
    with pytest.raises(RequestError, match=f"^{reason}"):
        parse_request(kind, text, 8)


def test_a_request_is_taken_once_and_removed(tmp_path):
    files = RequestFiles(tmp_path)
    assert files.waiting() == []
    assert files.take(PROFILE, 1) is None
    (tmp_path / "profile").write_text("steps=2")
    (tmp_path / "memory").touch()
    assert files.waiting() == [PROFILE, MEMORY]
    assert files.take(PROFILE, 1) == Request(PROFILE, 2)
    assert files.take(PROFILE, 1) is None
    assert files.take(MEMORY, 1) == Request(MEMORY)
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_is_put_back_replaces_no_new_one(tmp_path):
    files = RequestFiles(tmp_path)
    files.put_back(Request(MEMORY, ranks=None))
    assert (tmp_path / "memory").read_text() == "ranks=all"
    files.put_back(Request(MEMORY))
    assert files.take(MEMORY, 1) == Request(MEMORY, ranks=None)
    with pytest.raises(FileNotFoundError):
        RequestFiles(tmp_path / "gone").put_back(Request(MEMORY))


def test_settings_that_are_still_being_written_are_waited_for(tmp_path):
    path = tmp_path / "profile"
    with open(path, "w") as file:  # as the shell does for echo

        def write_once_it_is_taken():
            while path.exists():
                pass
            file.write("steps=4")
            file.flush()

        thread = threading.Thread(target=write_once_it_is_taken)
        thread.start()
        assert RequestFiles(tmp_path).take(PROFILE, 1) == Request(PROFILE, 4)
        thread.join()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "cannot be taken: it is not a regular file; remove it"),
        (os.mkfifo, "cannot be taken: it is not a regular file; remove it"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be taken: it is not a regular file; remove it"),
        (
            lambda path: (path.touch(), path.with_name(".profile-taken").mkdir()),
            "cannot be taken: Is a directory; remove it",
        ),
    ],
    ids=["folder", "pipe", "link", "in the way"],
)
def test_what_cannot_be_removed_is_refused_once(tmp_path, make, reason):
    path, files = tmp_path / "profile", RequestFiles(tmp_path)
    make(path)
    assert files.waiting() == [PROFILE]
    with pytest.raises(RequestError, match=f"^{path} {reason}$"):
        files.take(PROFILE, 1)
    assert files.waiting() == []
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "is not text: leave the file empty, or write any of: "),
        (b" " * 4097, "cannot be taken: it is larger than 4096 bytes; remove it"),
        (b"now!", ": 'now!' is not a setting: "),
    ],
)
def test_a_file_that_is_no_request_is_removed_and_refused(tmp_path, content, reason):
    (tmp_path / "profile").write_bytes(content)
    with pytest.raises(RequestError, match=f"^{tmp_path}/profile:? ?{reason.lstrip(': ')}"):
        RequestFiles(tmp_path).take(PROFILE, 1)
    assert list(tmp_path.iterdir()) == []


def test_looks_are_rare_and_rarer_where_the_disk_is_slow(tmp_path, monkeypatch):
    now, looks, lstat = [100.0], [], os.lstat

    def slow(path):
        looks.append(path)
        now[0] += 0.05
        return lstat(path)

    monkeypatch.setattr("dcscale.observe.requests.os.lstat", slow)
    files = RequestFiles(tmp_path, [PROFILE], clock=lambda: now[0])
    (tmp_path / "profile").touch()
    assert files.found()
    now[0] += 49.9  # a look took 0.05 s
    assert not files.found()
    assert len(looks) == 1
    now[0] += 0.2
    assert files.found()
    monkeypatch.setattr("dcscale.observe.requests.os.lstat", lstat)
    now[0] += 60
    assert files.found()
    now[0] += 0.9
    assert not files.found()
    now[0] += 0.2
    assert files.found()
