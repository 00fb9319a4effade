"""Runs whose data fail: on a server, on one rank only, and before a resume."""

import json
import os
import signal
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcscale.data import DataError, StreamConfig, build_shards, open_stream, read_manifest
from dcscale.data.storage import LocalStorage, UnreadableError
from dcscale.observe import Console
from dcscale.parallel import discover, start_distributed, stop_distributed
from dcscale.testing import shard_server as faults
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import make_text, tiny_config, train_here
from dcscale.testing.shard_server import ShardServer
from dcscale.train import StopReason, build_trainer

pytestmark = pytest.mark.distributed

READING = ["data.shuffle_shards=1", "data.slots=1", "validation.interval=0", "log.compose_interval=0"]
QUICK = ["data.timeout_seconds=0.5", "data.retry_backoff_seconds=0.001", "data.retry_total_seconds=5"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of about 16 sequences: a step of 8 sequences needs one shuffle block or two."""
    folder = tmp_path_factory.mktemp("data")
    build_shards([make_text(folder / "text")], folder / "shards", suffixes=[".txt"], hold_out=0.2, shard_tokens=500)
    return folder / "shards"


@pytest.fixture(scope="module")
def bad(shards):
    """A shard first needed in the middle of the run: its manifest entry, the step, and the rank that needs it."""
    stream = open_stream(
        shards / "train",
        StreamConfig(
            vocab_size=257, sequence_length=32, seed=0, shuffle_shards=1, slots=1, document_mask=True, verify=True
        ),
    )
    blocks = [{placement.block for placement in stream.planner.placements_of(g)} for g in range(64)]
    g = next(g for g in range(20, 48) if blocks[g] - blocks[g - 1])
    (block,) = blocks[g] - blocks[g - 1]
    (shard,) = stream.sources[0].order.shards(block)
    return stream.manifest.shards[shard], g // 8 + 1, g % 2


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(run)]


@pytest.fixture(scope="module", autouse=True)
def as_only_rank():
    """Leaves the process group of one rank that the tests join in this process, because DeepSpeed supports only one."""
    before = dict(os.environ)
    yield
    stop_distributed()
    os.environ.clear()
    os.environ.update(before)


def test_a_run_from_a_failing_server_equals_the_run_from_the_folder(shards, tmp_path):
    passing = [faults.status(503), faults.cut(900), faults.corrupt, faults.reset(), faults.cut(700, length=False)]
    with ShardServer(shards) as server:
        for number, info in enumerate(read_manifest(shards / "train").shards):
            server.faults[f"train/{info.name}"] = passing[number % 5 :] + passing[: number % 5]
        near = tiny_config(tmp_path / "near", shards, *READING)
        far = tiny_config(tmp_path / "far", shards, *READING, *QUICK, f"data.cache={tmp_path / 'cache'}")
        secret = f"http://user:secret@{server.host}/train?key=hidden"
        far.data.train, far.data.on_error = secret, "skip"
        for config in (near, far):
            train_here(config)
    assert losses(tmp_path / "near") == losses(tmp_path / "far")
    assert [record["skipped_shards"] for record in records(tmp_path / "far")] == [0] * 8
    assert "skipped_shards" not in records(tmp_path / "near")[0]
    for path in (tmp_path / "far").rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes(), path
            assert b"hidden" not in path.read_bytes(), path


def test_a_missing_shard_stops_the_run_with_its_url(shards, bad, tmp_path):
    info, step, _ = bad
    with ShardServer(shards) as server:
        config = tiny_config(tmp_path / "run", shards, *READING, *QUICK, f"data.train={server.address}/train")
        environment = discover()
        start_distributed(environment, 1)
        trainer = build_trainer(config, environment, Console(enabled=False))
        server.always[f"train/{info.name}"] = faults.status(404)
        with pytest.raises(DataError) as error:
            trainer.fit()
        trainer.close()
    assert str(error.value) == (
        f"the data of step {step} could not be read: rank 0: {server.address}/train/{info.name}: the manifest names "
        f"this shard, but it cannot be read: the server answers 404 Not Found; copy it again"
    )
    assert trainer.state.step == step - 1
    assert trainer.latest_checkpoint.name == f"step-{step - 1:08d}"


def _break(name, rank):
    """Makes a shard unreadable on one rank; returns a function that undoes it."""
    read = LocalStorage.read

    def failing(source, asked, *arguments):
        if asked == name:
            raise UnreadableError(source.location(asked), "Input/output error")
        return read(source, asked, *arguments)

    if discover().rank == rank:
        LocalStorage.read = failing

    def undo():
        LocalStorage.read = read

    return undo


def _skip_and_resume(configs, name, step, rank):
    found = []
    undo = _break(name, rank)
    with pytest.raises(DataError) as error:
        train_here(configs["refused"])
    trainer, _ = train_here(configs["whole"])
    found.append((trainer.loader._stream.skipped, trainer.state.skipped))
    configs["stopped"].train.stop_after = step
    train_here(configs["stopped"])
    undo()
    configs["stopped"].train.stop_after = None
    configs["stopped"].data.on_error = "fail"
    trainer, _ = train_here(configs["stopped"])
    found.append((trainer.loader._stream.skipped, trainer.state.skipped))
    return found, str(error.value)


def test_a_shard_skipped_by_one_rank_is_skipped_by_all_and_after_a_resume(shards, bad, tmp_path):
    info, step, rank = bad
    options = [*READING, "data.on_error=skip", "data.max_skipped=0.1"]
    configs = {name: tiny_config(tmp_path / name, shards, *options) for name in ("whole", "stopped", "refused")}
    configs["refused"].data.max_skipped = 0.001
    reason = f"{shards}/train/{info.name}: the manifest names this shard, but it cannot be read: Input/output error"
    for found, error in run_distributed(_skip_and_resume, 2, configs, info.name, step, rank):
        assert error.startswith(f"the data of step {step} could not be read: rank {rank}: {shards}/train: 1 of ")
        assert f"shards cannot be used ({info.name})" in error
        assert "data.max_skipped is 0.100%; repair these shards, or raise data.max_skipped" in error
        for skipped, state in found:
            assert skipped == {info.sha256}
            (entry,) = state
            assert entry["tokens"] == info.tokens
            assert entry["reason"].startswith(reason)
    for run in ("whole", "stopped"):
        counts = [(record["skipped_shards"], record["skipped_tokens"]) for record in records(tmp_path / run)]
        assert counts == [(0, 0)] * (step - 1) + [(1, info.tokens)] * (9 - step)
        board = EventAccumulator(str(tmp_path / run / "tensorboard"))
        board.Reload()
        assert [event.value for event in board.Scalars("data/skipped_shards")] == [0] * (step - 1) + [1] * (9 - step)
        (text,) = board.Tensors("data/skipped/text_summary")
        assert reason in text.tensor_proto.string_val[0].decode()
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        assert (summary["skipped_shards"], summary["skipped_tokens"]) == (1, info.tokens)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_a_skip_is_a_warning_at_the_terminal(shards, bad, tmp_path, capsys):
    info, step, _ = bad
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (shards / "train").iterdir():
        if path.name != info.name:
            (folder / path.name).write_bytes(path.read_bytes())
    config = tiny_config(tmp_path / "run", shards, *READING, f"data.train={folder}", "data.on_error=skip")
    config.data.max_skipped = 0.1
    environment = discover()
    start_distributed(environment, 1)
    trainer = build_trainer(config, environment, Console())
    trainer.fit()
    trainer.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning    step")]
    lost = [record["step"] for record in records(tmp_path / "run") if record["loss"] is None]
    assert warnings == [
        f"warning    step {step} skips a shard of {info.tokens:,} tokens: {folder}/{info.name}: the manifest names "
        f"this shard, but it cannot be read: No such file or directory; copy it again",
        f"warning    step {lost[0]} has no target to predict, so it has no loss and changes no weight; such steps are "
        f"counted as steps_without_targets",
    ]
    assert trainer.state.steps_without_targets == len(lost)
    assert trainer.state.padding_tokens >= 8 * 32 * len(lost), "placeholders of skipped shards are padding"


@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_signal_stops_a_run_that_waits_for_data(shards, bad, tmp_path, prefetch):
    info, step, _ = bad
    options = ["data.timeout_seconds=60", "data.retry_total_seconds=600", f"data.prefetch_steps={prefetch}"]
    sent = []

    def records_are_there():
        written = tmp_path / "run" / "metrics.jsonl"
        return written.exists() and written.stat().st_size > 0

    def stall_and_signal(handler, content):
        if handler.command == "HEAD":
            return handler.serve(content)
        while not records_are_there():  # prefetching may request the shard before the first step has ended
            time.sleep(0.05)
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return faults.stall()(handler, content)

    with ShardServer(shards) as server:
        server.always[f"train/{info.name}"] = stall_and_signal
        run = tiny_config(tmp_path / "run", shards, *READING, *options, f"data.train={server.address}/train")
        start = time.monotonic()
        trainer, stop_reason = train_here(run)
        assert time.monotonic() - start < 30
    assert stop_reason is StopReason.SIGNAL
    assert trainer.state.step < step
    assert trainer.latest_checkpoint.name == f"step-{trainer.state.step:08d}"
    assert trainer.state.step > 0
