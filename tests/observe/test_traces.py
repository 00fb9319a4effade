"""The table of a trace, and files that appear when they are complete."""

import pickle
import tempfile
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

from dcscale.observe.memory import MOST_CUDA_EVENTS, MemoryLook, live_tensors, tensor_table
from dcscale.observe.traces import PHASES, Span, StepTrace, publish, table_of
from dcscale.parallel import PHASES as PHASES_OF_THE_CLOCK


def test_the_phases_are_those_of_the_step_clock():
    assert PHASES == PHASES_OF_THE_CLOCK


MS = 1_000_000


def span(name, start, end, kind="cpu_op", thread=1):
    return Span(name, kind, thread, start * MS, end * MS)


def test_the_table_of_a_trace():
    spans = [
        span("ProfilerStep#9", 100, 150, "user_annotation"),
        span("ProfilerStep#10", 150, 250, "user_annotation"),
        span("forward", 160, 170, "user_annotation"),
        span("forward", 180, 190, "user_annotation"),
        span("backward", 190, 240, "user_annotation"),
        span("aten::linear", 160, 168),
        span("aten::mm", 161, 167),
        span("aten::view", 161, 161),
        span("aten::mm", 200, 201, thread=2),
        span("aten::add", 201, 202, thread=2),
        span("gemm", 165, 169, "kernel", thread=7),
        span("Memcpy", 165, 166, "gpu_memcpy", thread=7),
    ]
    lines = table_of(spans).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["ms", "of", "all", *PHASES],
        ["step", "9", "50.000", "0.000", "0.000", "0.000", "0.000"],
        ["step", "10", "100.000", "0.000", "20.000", "50.000", "0.000"],
    ]
    device, host = lines.index("on the device:"), lines.index("on the host, without what is called from within:")
    assert [line.split() for line in lines[device + 2 : device + 4]] == [
        ["4.000", "80.0%", "1", "4,000.0", "gemm"],
        ["1.000", "20.0%", "1", "1,000.0", "Memcpy"],
    ]
    rows = {line.split()[-1]: line.split()[:4] for line in lines[host + 2 :]}
    # 150 ms in the steps of thread 1, and 2 ms in thread 2.
    assert rows["aten::mm"] == ["7.000", "4.6%", "2", "3,500.0"]
    assert rows["aten::linear"][0] == "2.000"
    assert rows["forward"][0] == "12.000"
    assert rows["ProfilerStep#10"][0] == "30.000"
    assert rows["aten::view"] == ["0.000", "0.0%", "1", "0.0"]
    assert sum(float(row[0]) for row in rows.values()) == 152


def test_the_table_of_nothing():
    assert table_of([]).splitlines()[-1].endswith("name")


def test_a_trace_that_torch_could_not_export_is_an_error(small_disk, tmp_path, monkeypatch):
    folder = tmp_path / "profiles"
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk.folder))
    small_disk.fill()
    trace = StepTrace(torch.device("cpu"))
    trace.start()
    torch.ones(3).sum()
    trace.stop()
    with pytest.raises(OSError, match=f"the trace could not be written to {small_disk.folder}: no space left"):
        trace.write(folder, "rank-0", "title")
    assert not folder.exists()
    assert list(small_disk.folder.glob("*.json")) == []


def test_a_file_that_fails_halfway_leaves_nothing_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.txt"
    publish(path, lambda target: target.write(b"old"))

    def fail(target):
        target.write(b"half")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        publish(path, fail)
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [("a.txt", b"old")]


def test_tensors_are_counted_by_shape_and_storages_once():
    kept = torch.zeros(1234, 567)
    views = [kept[:1000], kept[:1000]]
    sparse = torch.zeros(3, 3).to_sparse()
    meta = torch.zeros(4321, 7, device="meta")
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(4321, 8)
    assert any(tensor is kept for tensor in live_tensors())
    lines = [line.split() for line in tensor_table().splitlines()]
    assert [f"{1234 * 567 * 4 / 2**20:.2f}", "1", "[1234,", "567]", "float32", "on", "cpu"] in lines
    assert [f"{2 * 1000 * 567 * 4 / 2**20:.2f}", "2", "[1000,", "567]", "float32", "on", "cpu"] in lines
    assert "4321" not in tensor_table()
    assert len([*views, sparse, meta, fake]) == 5


def test_a_tracemalloc_of_the_user_is_left_running(tmp_path):
    tracemalloc.start()
    try:
        look = MemoryLook(torch.device("cpu"))
        look.start()
        kept = [bytes(1 << 16) for _ in range(20)]
        look.stop()
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    (path,) = look.write(tmp_path, "rank-0-memory", "title")
    text = path.read_text()
    assert text.startswith("title\n\nbefore the step: ")
    line = next(line for line in text.splitlines() if "test_traces.py" in line)
    assert float(line.split()[0].replace(",", "")) >= len(kept) * 64


def test_on_a_gpu_the_allocations_of_the_step_are_recorded(tmp_path, monkeypatch):
    calls = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **arguments: calls.append(arguments), _snapshot=lambda: {"segments": [1]}
    )
    monkeypatch.setattr(torch.cuda, "memory", memory)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: f"summary of {device}")
    look = MemoryLook(torch.device("cuda", 3))
    look.start()
    assert calls == [{"stacks": "python", "max_entries": MOST_CUDA_EVENTS}]
    look.stop()
    assert calls[1:] == [{"enabled": None}]
    text, snapshot = look.write(tmp_path, "rank-3-memory", "title")
    assert "summary of cuda:3" in text.read_text()
    assert pickle.loads(snapshot.read_bytes()) == {"segments": [1]}
