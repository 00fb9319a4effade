"""A build that is interrupted, at any moment and in any way, resumes to the same bytes as an uninterrupted one."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcscale.data import ByteTokenizer, DataError, build_shards, read_manifest
from dcscale.data.prepare import shuffle
from dcscale.data.prepare.documents import split_into_chunks
from dcscale.data.prepare.journal import Journal
from dcscale.data.prepare.sources import find_files
from dcscale.files import publish_folder
from dcscale.lease import LeaseTimes

REPOSITORY = Path(__file__).parents[3]
SIZES = {"shard_tokens": 400, "bundle_tokens": 100, "hold_out": 0.3, "bucket_bytes": 1000}


def make_corpus(folder, files=6, lines=12):
    folder.mkdir()
    for i in range(files):
        texts = (f"file {i} line {j} " + "x" * (i * 7 + j * 5) for j in range(lines))
        (folder / f"{i}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def tree(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def expected(corpus):
    build_shards([corpus], corpus.parent / "reference", **SIZES)
    return tree(corpus.parent / "reference")


KILL_AT_EVERY_STEP = """
import os, shutil, signal, sys
from dcscale.data import build_shards

corpus, folder, stride, sizes = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
steps, last = 0, None

def count(event, arguments):
    global steps
    if last is not None and event in CHANGES and folder in str(arguments[0]):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

def build(out, kill_at):
    global last
    child = os.fork()
    if child == 0:
        last = kill_at
        build_shards([corpus], out, **sizes)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

sys.addaudithook(count)
first = 1
while build(f"{folder}/{first}", first) != 0:
    # Killed again at another step, then run to its end.
    build(f"{folder}/{first}", 1 + first * 7 % 40)
    if not os.path.exists(f"{folder}/{first}"):
        assert build(f"{folder}/{first}", 0) == 0
    first += stride
print(first)
"""


def test_a_build_killed_at_any_step_resumes_to_the_same_bytes(corpus, expected, tmp_path):
    command = [sys.executable, "-c", KILL_AT_EVERY_STEP, str(corpus), str(tmp_path), "6", repr(SIZES)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150, "the build has as many steps at which it can be killed"
    for path in tmp_path.iterdir():
        if not path.name.startswith("."):
            assert tree(path) == expected


def state_of(out):
    (state,) = [path for path in out.with_name(f".{out.name}.building").iterdir() if path.is_dir()]
    return state


def interrupt(monkeypatch, corpus, out, chunks=1000, shards=1000, **changes):
    """A build in this process that is interrupted after some chunks or shards; returns what it did."""
    did = count_work(monkeypatch, chunks, shards)
    with pytest.raises(KeyboardInterrupt):
        build_shards([corpus], out, **{**SIZES, **changes})
    monkeypatch.undo()
    return did


def count_work(monkeypatch, chunks=1000, shards=1000):
    did = {"spool_chunk": 0, "write_planned_shard": 0}

    def count(name, most):
        function = getattr(sys.modules["dcscale.data.prepare.build"], name)

        def counted(*arguments):
            if did[name] == most:
                raise KeyboardInterrupt
            did[name] += 1
            return function(*arguments)

        monkeypatch.setattr(f"dcscale.data.prepare.build.{name}", counted)

    count("spool_chunk", chunks)
    count("write_planned_shard", shards)
    return did


def test_what_is_done_is_not_done_again(corpus, expected, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shards = sum(name.endswith(".tar") for name in expected)
    assert interrupt(monkeypatch, corpus, out, chunks=4) == {"spool_chunk": 4, "write_planned_shard": 0}
    assert interrupt(monkeypatch, corpus, out, shards=3) == {"spool_chunk": 2, "write_planned_shard": 3}
    did = count_work(monkeypatch)
    build_shards([corpus], out, **SIZES, progress=True)
    assert did == {"spool_chunk": 0, "write_planned_shard": shards - 3}
    assert "Resuming the interrupted build: 6 chunks of text and 3 shards are done." in capsys.readouterr().err
    assert tree(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no state is left"


def test_every_chunk_is_in_the_journal_before_the_next_one_starts(corpus, tmp_path, monkeypatch):
    noted, spool_chunk = [], sys.modules["dcscale.data.prepare.build"].spool_chunk

    def count_lines(*arguments):
        noted.append((state_of(tmp_path / "out") / "journal").read_bytes().count(b"\n"))
        return spool_chunk(*arguments)

    monkeypatch.setattr("dcscale.data.prepare.build.spool_chunk", count_lines)
    build_shards([corpus], tmp_path / "out", **SIZES)
    assert noted == list(range(6))


def test_the_report_includes_what_earlier_calls_did(corpus, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": ""}\n')
    reference = build_shards([tmp_path / "bad.jsonl", corpus], tmp_path / "reference", **SIZES, on_bad_row="skip")
    count_work(monkeypatch, shards=4)
    with pytest.raises(KeyboardInterrupt):
        build_shards([tmp_path / "bad.jsonl", corpus], tmp_path / "out", **SIZES, on_bad_row="skip")
    monkeypatch.undo()
    again = build_shards([tmp_path / "bad.jsonl", corpus], tmp_path / "out", **SIZES, on_bad_row="skip")
    assert (again.empty, again.skipped) == (reference.empty, reference.skipped)
    assert (again.empty, again.skipped.first) == (1, {"not UTF-8": "bad.jsonl:1"})
    assert list(again.splits.values()) == list(reference.splits.values())
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_a_build_stopped_by_a_bad_row_resumes_when_it_may_be_skipped(corpus, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n')
    inputs, out = [corpus, tmp_path / "bad.jsonl"], tmp_path / "out"
    with pytest.raises(DataError, match="bad.jsonl, line 1"):
        build_shards(inputs, out, **SIZES)
    did = count_work(monkeypatch, shards=0)
    with pytest.raises(KeyboardInterrupt):
        build_shards(inputs, out, **SIZES, on_bad_row="skip")
    assert did["spool_chunk"] == 1
    monkeypatch.undo()
    with pytest.raises(
        DataError,
        match=r"holds this build, interrupted, and rows were left out .* such as bad\.jsonl:1; pass --on-bad-row",
    ):
        build_shards(inputs, out, **SIZES)
    assert build_shards(inputs, out, **SIZES, on_bad_row="skip").skipped.by_reason == {"not UTF-8": 1}


CHANGES = {
    "seed": lambda corpus: {"seed": 1},
    "shard_tokens": lambda corpus: {"shard_tokens": 500},
    "bundle_tokens": lambda corpus: {"bundle_tokens": 50},
    "hold_out": lambda corpus: {"hold_out": 0.4},
    "text_field": lambda corpus: {"text_field": "more"},
    "format": lambda corpus: {"format": "text", "suffixes": [".jsonl"]},
    "pack": lambda corpus: {"pack": "best-fit", "sequence_length": 50},
    "input_bytes": lambda corpus: (corpus / "1.jsonl").write_text('{"text": "new", "more": "new"}'),
    "input_files": lambda corpus: (corpus / "9.jsonl").write_text('{"text": "new", "more": "new"}'),
    "input_paths_sizes_and_times": lambda corpus: os.utime(corpus / "1.jsonl"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_build_with_other_arguments_or_inputs_starts_over_and_reports_it(corpus, tmp_path, monkeypatch, capsys, name):
    text, out = tmp_path / "text", tmp_path / "out"
    shutil.copytree(corpus, text)
    for path in text.iterdir():
        lines = [{**json.loads(line), "more": f"more {line}"} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, lines)))
    interrupt(monkeypatch, text, out, shards=2)
    state = state_of(out)
    changed = CHANGES[name](text)
    options = {**SIZES, **(changed if isinstance(changed, dict) else {})}
    build_shards([text], tmp_path / "reference", **options)
    build_shards([text], out, **options, progress=True)
    printed = capsys.readouterr().err
    assert "Starting a new build: there is an interrupted build with other arguments or inputs. " in printed
    assert re.search(rf"{state}: .*{name} .* \(now ", printed)
    assert tree(out) == tree(tmp_path / "reference")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference", "text"]


def test_an_interrupted_build_survives_a_call_with_other_arguments(corpus, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(monkeypatch, corpus, out, shards=3)
    interrupt(monkeypatch, corpus, out, chunks=1, seed=7)
    did = count_work(monkeypatch)
    build_shards([corpus], out, **SIZES)
    assert did["spool_chunk"] == 0
    assert tree(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_state_of_a_build_is_never_an_input(corpus, expected, tmp_path, monkeypatch):
    """Even if the output is inside the input, and the suffixes match files of the state."""
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    options = {**SIZES, "suffixes": (".jsonl", ".json", ".tokens", ".index")}
    interrupt(monkeypatch, text, text / "out", chunks=3, **options)
    did = count_work(monkeypatch)
    build_shards([text], text / "out", **options)
    assert did["spool_chunk"] == 3
    assert tree(text / "out") == expected


QUICK = LeaseTimes(renew=0.02, expire=0.5, poll=0.01)


def test_one_process_at_a_time(corpus, tmp_path, capsys):
    who = rf"process {os.getpid()} on \S+, since .* UTC"
    refused = f"/.out.building is in use by {who}; wait until it has built this output, or give another output"
    with (
        Journal(tmp_path / "out", {}, QUICK),
        pytest.raises(DataError, match=refused),
        Journal(tmp_path / "out", {}, QUICK),
    ):
        pass
    assert re.match(f"waiting    for {who}, which may still use {tmp_path}/.out.building: ", capsys.readouterr().err)
    build_shards([corpus], tmp_path / "out", **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("action", ["publish", "mark_all_spooled"])
def test_a_build_that_was_suspended_leaves_everything_to_the_one_that_has_taken_over(tmp_path, action):
    state = tmp_path / ".out.building"
    suspended = Journal(tmp_path / "out", {}, QUICK)

    def build():
        with suspended:
            lease = json.loads((state / "lease.json").read_text())
            (tmp_path / "new").write_text(json.dumps({**lease, "token": "another", "pid": 1}))
            (tmp_path / "new").rename(state / "lease.json")
            for _ in range(100):
                getattr(suspended, action)()
                time.sleep(QUICK.renew)  # it finds out by a renewal; before it publishes, by a look of its own

    with pytest.raises(DataError, match=f"{state} was taken over by process 1 on "):
        build()
    assert suspended.folder.exists()
    assert json.loads((state / "lease.json").read_text())["token"] == "another"
    assert not (tmp_path / "out").exists()


def test_the_old_output_is_restored_after_a_kill_between_the_two_renames(corpus, expected, tmp_path):
    out = tmp_path / "out"
    build_shards([corpus], out, **SIZES)
    (tmp_path / ".out.building").mkdir()
    out.rename(tmp_path / ".out.building/replaced")
    with pytest.raises(DataError, match="already exists"):
        build_shards([corpus], out, **{**SIZES, "seed": 1})
    assert tree(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_state_left_by_a_kill_after_publishing_is_not_resumed(corpus, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def publish_and_die(*folders):
        publish_folder(*folders)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dcscale.data.prepare.journal.publish_folder", publish_and_die)
    with pytest.raises(KeyboardInterrupt):
        build_shards([corpus], out, **SIZES)
    monkeypatch.undo()
    assert tree(out) == expected
    assert not (state_of(out) / "result").exists()
    shutil.rmtree(out)
    build_shards([corpus], out, **SIZES)
    assert tree(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def largest(state, pattern):
    return max(state.glob(f"spool/{pattern}"), key=lambda path: path.stat().st_size)


CORRUPTIONS = {
    "tokens zeroed": (
        lambda s: largest(s, "*.tokens").write_bytes(bytes(largest(s, "*.tokens").stat().st_size)),
        r"tokens of \S+ from \d+ on differ",
    ),
    "tokens cut": (lambda s: os.truncate(largest(s, "*.tokens"), 301), r"tokens of \S+ from \d+ on differ"),
    "tokens lost": (lambda s: os.truncate(largest(s, "*.tokens"), 0), r"tokens of \S+ from \d+ on differ"),
    "index cut": (lambda s: os.truncate(largest(s, "*.index"), 50), r"\d+ documents of \w+ instead of \d+"),
    "index zeroed": (lambda s: largest(s, "*.index").write_bytes(bytes(400)), r"tokens of \S+ from 0 on differ"),
    "index lost": (lambda s: largest(s, "*.index").unlink(), r"\d+ documents of \w+ instead of \d+"),
}


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupt_spool_files_are_refused(corpus, expected, tmp_path, monkeypatch, corrupt, message):
    out = tmp_path / "out"
    interrupt(monkeypatch, corpus, out, shards=0)
    corrupt(state_of(out))
    with pytest.raises(DataError, match=rf"spool: is corrupt: .*{message}.*remove the folder"):
        build_shards([corpus], out, **SIZES)
    assert not out.exists()
    shutil.rmtree(state_of(out))
    build_shards([corpus], out, **SIZES)
    assert tree(out) == expected


@pytest.mark.parametrize("suffix", [".tokens", ".index"])
def test_a_worker_starts_new_spool_files_after_a_failure(corpus, tmp_path, monkeypatch, suffix):
    """As when the disk is full for a moment, and the worker has more chunks to do."""
    task = shuffle.SpoolTask(
        tmp_path, "run", "byte", ByteTokenizer.fingerprint, None, "uint16", "text", False, 0.0, 0, 1
    )

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[:33])
            self.file.flush()
            raise OSError(28, "No space left on device")

        def writelines(self, parts):
            self.write(b"".join(parts))

    def open_on_full_disk(path, mode):
        return FullDisk(open(path, mode)) if path.suffix == suffix else open(path, mode)

    done = []
    for numbered in enumerate(split_into_chunks(find_files([corpus])[0])):
        with monkeypatch.context() as patch:
            if numbered[0] == 2:
                patch.setattr(shuffle, "open", open_on_full_disk, raising=False)
                with pytest.raises(OSError, match="No space left"):
                    shuffle.spool_chunk(task, numbered)
                continue
        done.append(shuffle.spool_chunk(task, numbered))
    plans = list(shuffle.plan_shards(tmp_path, "train", 400, done))
    layout = shuffle.ShardLayout("uint16", 100, 256, 0, None, None)
    written = [shuffle.write_planned_shard(tmp_path, layout, plan) for plan in plans]
    assert sum(shard.documents for shard in written) == 5 * 12


def test_the_lines_before_a_corrupt_one_in_the_journal_count(corpus, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for tail in (b'["chunk", [3', b'["chunk", [3, "x"\n["spooled", null]\n', b"\0" * 50):
        interrupt(monkeypatch, corpus, out, chunks=2, overwrite=True)
        with open(state_of(out) / "journal", "ab") as journal:
            journal.write(tail)
        assert interrupt(monkeypatch, corpus, out, chunks=1, overwrite=True)["spool_chunk"] == 1
        lines = (state_of(out) / "journal").read_text().splitlines()
        assert [json.loads(line)[1][0] for line in lines] == [0, 1, 2]
        build_shards([corpus], out, **SIZES, overwrite=True)
        assert tree(out) == expected


def start_tool(corpus, out, workers):
    options = ["--workers", workers, "--shard-tokens", 400, "--bundle-tokens", 100, "--hold-out", 0.3]
    command = [sys.executable, REPOSITORY / "tools/make_shards.py", corpus, "--output", out, *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), env=environment, text=True, start_new_session=True, **streams)


def wait_for_lines(out, kind, count):
    """Wait until the journal has ``count`` lines of a kind."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for journal in out.with_name(f".{out.name}.building").glob("*/journal"):
            if journal.read_text().count(f'["{kind}"') >= count:
                return
        time.sleep(0.002)
    raise AssertionError(f"no {count} lines of {kind} in two minutes")


def test_the_tool_killed_in_each_pass_with_any_workers(tmp_path):
    corpus, out = make_corpus(tmp_path / "text", files=150, lines=8), tmp_path / "out"
    build_shards([corpus], tmp_path / "reference", shard_tokens=400, bundle_tokens=100, hold_out=0.3)
    expected = tree(tmp_path / "reference")

    tool = start_tool(corpus, out, workers=2)
    wait_for_lines(out, "chunk", 10)
    os.killpg(tool.pid, signal.SIGKILL)  # all of its processes
    tool.communicate(timeout=60)

    tool = start_tool(corpus, out, workers=3)
    wait_for_lines(out, "shard", 10)
    tool.send_signal(signal.SIGKILL)  # its first process only
    tool.communicate(timeout=60)  # returns when the last worker has closed the pipe
    assert not out.exists()

    tool = start_tool(corpus, out, workers=2)
    wait_for_lines(out, "shard", 30)
    os.killpg(tool.pid, signal.SIGINT)  # Ctrl-C
    _, printed = tool.communicate(timeout=60)
    assert "Resuming the interrupted build: 150 chunks of text" in printed
    state = tmp_path / ".out.building"
    assert "make_shards: interrupted\nTo resume, run the same command again; to discard the build, remove" in printed
    assert printed.endswith(f"{state}\n")
    assert tool.returncode == 130
    assert not out.exists()

    build_shards([corpus], out, shard_tokens=400, bundle_tokens=100, hold_out=0.3)
    assert tree(out) == expected
    assert len(read_manifest(out / "train").shards) > 40
