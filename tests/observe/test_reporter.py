"""Records of a run in metrics.jsonl, TensorBoard and the terminal."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from dcscale.observe import Console
from dcscale.observe.reporter import Reporter


def reporter(run, last_step=0, is_main=True, progress=False):
    return Reporter(run, last_step, 5, Console(enabled=is_main), progress, is_main)


def record_of(step, loss, **more):
    return {"step": step, "tokens": step * 256, "loss": loss, "tokens_per_second": 1234.5, "mfu": None, **more}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensorboard(run):
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def points(run, tag):
    return [(event.step, pytest.approx(event.value)) for event in tensorboard(run).Scalars(tag)]


def test_a_run_in_file_tensorboard_and_terminal(tmp_path, capsys):
    training = record_of(1, 2.5, mfu=0.4, **{"compose/pre/layer_00": 0.1, "compose/post/layer_00": 0.2})
    validation = {"step": 1, "validation_loss": 2.25, "bits_per_byte": 3.125}
    report = reporter(tmp_path)
    report.record(training)
    report.record(validation)
    report.text("samples/prompt_0", "<pre>heads are</pre>", 1)
    report.close()

    assert metrics(tmp_path) == [training, validation]
    assert points(tmp_path, "loss/train") == [(1, 2.5)]
    assert points(tmp_path, "loss/validation") == [(1, 2.25)]
    assert points(tmp_path, "loss/bits_per_byte") == [(1, 3.125)]
    assert points(tmp_path, "speed/mfu") == [(1, 0.4)]
    assert points(tmp_path, "weights/compose/pre/layer_00") == [(1, 0.1)]
    assert points(tmp_path, "weights/compose/post/layer_00") == [(1, 0.2)]
    (text,) = tensorboard(tmp_path).Tensors("samples/prompt_0/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (1, [b"<pre>heads are</pre>"])
    assert capsys.readouterr().out == "step 1: validation loss 2.2500 nats/token, 3.1250 bits/byte\n"


def test_unknown_values_are_null_in_the_file_and_absent_from_tensorboard_and_terminal(tmp_path, capsys):
    report = reporter(tmp_path)
    report.record(record_of(1, 2.5))
    report.record({"step": 1, "validation_loss": 2.25})
    report.close()
    assert metrics(tmp_path)[0]["mfu"] is None
    assert "speed/mfu" not in tensorboard(tmp_path).Tags()["scalars"]
    assert capsys.readouterr().out == "step 1: validation loss 2.2500 nats/token\n"


def test_charts_of_several_curves(tmp_path):
    reporter(tmp_path).close()
    (event,) = tensorboard(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {
        (group.title, chart.title): list(chart.multiline.tag) for group in layout.category for chart in group.chart
    }
    assert charts == {
        ("loss", "training and validation"): ["loss/train", "loss/validation"],
        ("compose", "pre"): ["weights/compose/pre/.*"],
        ("compose", "post"): ["weights/compose/post/.*"],
    }


def test_progress_shows_loss_speed_and_mfu_where_it_is_known(tmp_path, capsys):
    report = reporter(tmp_path, progress=True)
    report.record(record_of(1, 2.5))
    report.record(record_of(5, 2.0, mfu=0.4))
    report.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/5 | loss 2.5000 | tok/s 1,234 | ")
    assert last.startswith("step 5/5 | loss 2.0000 | tok/s 1,234 | mfu 40.0% | ")


def test_progress_without_a_loss(tmp_path, capsys):
    report = reporter(tmp_path, progress=True)
    report.record(record_of(1, None, grad_norm=None, steps_without_targets=1))
    report.close()
    assert metrics(tmp_path)[0]["loss"] is None
    shown = {"progress/tokens", "data/steps_without_targets", "speed/tokens_per_second"}
    assert set(tensorboard(tmp_path).Tags()["scalars"]) == shown
    assert capsys.readouterr().out.startswith("step 1/5 | loss none | tok/s 1,234 | ")


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    report = reporter(tmp_path, is_main=False, progress=True)
    report.record(record_of(1, 2.5))
    report.record({"step": 1, "validation_loss": 2.25})
    report.text("samples/prompt_0", "text", 1)
    report.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_after_a_resume_from_an_earlier_step_every_step_is_there_once(tmp_path):
    report = reporter(tmp_path)
    for step in range(1, 6):
        report.record(record_of(step, float(step)))
    report.close()
    report = reporter(tmp_path, last_step=3)
    report.record(record_of(4, 40.0))
    report.close()
    assert [(record["step"], record["loss"]) for record in metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert points(tmp_path, "loss/train") == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_rollback_drops_later_records_here_and_in_tensorboard(tmp_path):
    report = reporter(tmp_path)
    for step in range(1, 6):
        report.record(record_of(step, float(step)))
    report.drop_after(3)
    report.record(record_of(4, 40.0))
    report.close()
    assert [(record["step"], record["loss"]) for record in metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert points(tmp_path, "loss/train") == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_full_disk_is_reported_once_a_file_and_nothing_is_lost(small_disk, capfd):
    run = small_disk.folder / "run"
    run.mkdir()
    report = reporter(run)
    report.record(record_of(1, 1.0))
    small_disk.fill()
    for step in range(2, 100):  # some fit into the last page
        report.record(record_of(step, float(step)))
    metrics(run)  # complete lines only
    (event_file,) = (run / "tensorboard").iterdir()
    files = [run / "metrics.jsonl", event_file]
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2
    for line, file in zip(sorted(said), files):
        assert line.startswith(f"warning    {file} cannot be written: No space left on device. Training continues; ")
    small_disk.make_room()
    report.record(record_of(100, 100.0))
    report.close()
    assert [record["step"] for record in metrics(run)] == list(range(1, 101))
    assert points(run, "loss/train") == [(step, step) for step in range(1, 101)]
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"warning    {file} can be written again" for file in files]
    assert err == ""


def test_records_that_a_full_disk_has_not_taken_until_the_end_are_reported(small_disk, capfd):
    report = reporter(small_disk.folder)
    report.record(record_of(1, 1.0))
    small_disk.fill()
    for step in range(2, 100):
        report.record(record_of(step, float(step)))
    report.close()
    written = [record["step"] for record in metrics(small_disk.folder)]
    assert written == list(range(1, len(written) + 1))
    lost = (
        f"warning    {99 - len(written)} lines could not be written to {small_disk.folder}/metrics.jsonl and are lost"
    )
    assert lost in capfd.readouterr().out.splitlines()


def test_a_folder_that_cannot_be_made_keeps_the_run_from_starting(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(FileExistsError):
        reporter(tmp_path)
