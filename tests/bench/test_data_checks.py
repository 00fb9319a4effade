"""Restarts and defects: the results of the checks for readers with known behavior, including dcscale's."""

import importlib.metadata
import subprocess
import tempfile
from collections import Counter

import numpy as np
import pytest

from dcscale.bench.data import KINDS, elastic, faults, probe
from dcscale.bench.data.corpus import EOS_ID, VOCAB_SIZE, make_corpus
from dcscale.bench.data.reader import Settings, missing


@pytest.fixture
def in_process(monkeypatch):
    """Runs probes in this process, because processes that import torch take seconds to start."""

    def start(task, kind, settings, *, port=0, **more):
        return lambda: probe.TASKS[task](kind, settings, **more)

    def finish(call, timeout):
        try:
            result = call()
            return result | {"logged": None} if isinstance(result, dict) else result
        except Exception as error:
            raise probe.ProbeError(f"{type(error).__name__}: {error}") from error

    monkeypatch.setattr(probe, "start", start)
    monkeypatch.setattr(probe, "finish", finish)


def test_dcscale_resumes_with_the_same_batches_on_any_ranks(tmp_path, in_process):
    after = [(2, 0), (3, 0), (1, 0), (6, 0)]
    found = elastic.check("dcscale", tmp_path, print, (2, 0), after)
    assert [row["after"] for row in found] == [list(shape) for shape in after]
    assert {row["outcome"] for row in found} == {"same batches"}
    assert {row["rows"] for row in found} == {elastic.SHARDS * elastic.ROWS}


def test_a_reader_without_a_state_does_not_pass(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("dcscale.bench.data.reader.DcscaleReader.state", lambda self: 1 / 0)
    (row,) = elastic.check("dcscale", tmp_path, print, (1, 0), [(1, 0)])
    assert row["outcome"] == "not run"
    assert row["error"].startswith("ZeroDivisionError")


def test_a_rejected_state_is_reported(tmp_path, in_process, monkeypatch):
    def reject(self, state):
        raise ValueError("another shape")

    monkeypatch.setattr("dcscale.bench.data.reader.DcscaleReader.restore", reject)
    (row,) = elastic.check("dcscale", tmp_path, print, (1, 0), [(1, 0)])
    assert (row["outcome"], row["error"]) == ("refused", "ValueError: another shape")


def test_a_restart_that_loses_and_repeats_is_found(tmp_path, in_process, monkeypatch):
    def skip_a_step(self, state):
        self._consumed = state["consumed"] + elastic.GLOBAL_BATCH

    def repeat_a_step(self, state):
        self._consumed = state["consumed"] - elastic.GLOBAL_BATCH

    for restore, outcome in ((skip_a_step, "12 lost, 0 repeated"), (repeat_a_step, "0 lost, 12 repeated")):
        monkeypatch.setattr("dcscale.bench.data.reader.DcscaleReader.restore", restore)
        (row,) = elastic.check("dcscale", tmp_path, print, (1, 0), [(1, 0)])
        assert row["outcome"] == outcome


def test_rows_in_other_batches_are_detected():
    uninterrupted = [Counter("ab"), Counter("cd"), Counter("ef")]
    for resumed, outcome in ((("dc", "fe"), "same batches"), (("ce", "df"), "exact, in other batches")):
        found = elastic.compare(uninterrupted, uninterrupted[:1], [Counter(rows) for rows in resumed])
        assert found["outcome"] == outcome


def test_steps_are_joined_over_ranks_of_different_length():
    assert elastic.join([[["a"], ["b"]], [["c"]]]) == [Counter("ac"), Counter("b")]


def test_dcscale_finds_every_defect(in_process):
    found = faults.check("dcscale", print)
    assert {row["defect"]: row["outcome"] for row in found} == dict.fromkeys(faults.DEFECTS, "found")


def test_defects_that_webdataset_does_not_report_are_detected(in_process):
    found = {row["defect"]: row for row in faults.check("webdataset", print)}
    assert found["bit flip"] | {"outcome": "silent", "fewer": 0, "other": 1} == found["bit flip"]
    assert found["cut between samples"]["outcome"] == "silent"
    assert found["cut between samples"]["fewer"] > 5
    assert found["missing"]["outcome"] == "found"


def test_a_defect_that_a_format_cannot_have_is_reported(in_process):
    found = {row["defect"]: row for row in faults.check("flat", print, ["bit flip", "zeroed header", "swapped"])}
    assert [row["outcome"] for row in found.values()] == ["silent", "does not apply", "does not apply"]


def test_no_harm_is_not_called_silent():
    assert faults.compare(Counter("ab"), Counter("ba"))["outcome"] == "no harm"


def test_an_error_that_is_only_logged_is_distinguished():
    found = faults.compare(Counter("abc"), Counter("ab"), "ValueError: Checksum failure")
    assert (found["outcome"], found["fewer"], found["other"]) == ("logged only", 1, 0)


def test_a_failed_probe_reports_its_error(tmp_path):
    settings = Settings(str(tmp_path / "absent"), 64, 4)
    with pytest.raises(probe.ProbeError, match=r"DataError: .*absent: no such folder"):
        probe.run("rows", "dcscale", settings)
    with pytest.raises(probe.ProbeError, match="timed out after 0 s"):
        probe.run("plan", "dcscale", settings, timeout=0.01, shards=1_000_000)


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ('probe result: {"rows": []}', {"rows": [], "logged": None}),
        (
            '  ValueError: Checksum failure\nprobe result: {"rows": []}',
            {"rows": [], "logged": "ValueError: Checksum failure"},
        ),
        ("probe result: [1]", [1]),
    ],
)
def test_a_result_comes_with_what_was_logged(printed, found):
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(["printf", "%s\n", printed], stdout=output, start_new_session=True)
    assert probe.finish(probe.Probe(process, output), 10) == found


def test_a_probe_without_output_reports_its_exit_code():
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(["false"], stdout=output, start_new_session=True)
    with pytest.raises(probe.ProbeError, match="^exit code 1$"):
        probe.finish(probe.Probe(process, output), 10)


def test_a_missing_library_is_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert missing(["dcscale", "flat", "litdata"]) == {"litdata": "not installed: litdata"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mosaic-hashed"])
def test_every_reader_yields_the_tokens_of_the_data(kind, tmp_path):
    if missing([kind]):
        pytest.skip(f"{KINDS[kind].library} is not installed")
    corpus = make_corpus(4, 64 * 16, 64)
    settings = Settings(str(probe.written(kind, corpus, tmp_path)), 64, 16)
    np.save(tmp_path / "histogram.npy", corpus.histogram())
    found = probe.rate(kind, settings, str(tmp_path / "histogram.npy"), epochs=1)
    assert found["wrong"] is None
    assert found["epochs"][0]["tokens"] == corpus.tokens_ST.size


def test_wrong_tokens_are_not_timed(tmp_path):
    settings = Settings(str(probe.written("flat", make_corpus(4, 1024, 64), tmp_path)), 64, 16)
    np.save(tmp_path / "histogram.npy", make_corpus(4, 1024, 64, seed=1).histogram())
    found = probe.rate("flat", settings, str(tmp_path / "histogram.npy"), epochs=1)
    assert "tokens differ from the data" in found["wrong"]
    assert "epochs" not in found
    np.save(tmp_path / "histogram.npy", make_corpus(5, 1024, 64).histogram())
    found = probe.rate("flat", settings, str(tmp_path / "histogram.npy"), epochs=1)
    assert found["wrong"] == "4,096 tokens in an epoch instead of 5,120"


def test_only_one_token_of_padding_is_allowed():
    expected = np.full(VOCAB_SIZE, 2)
    found = expected.copy()
    found[[3, EOS_ID]] += [-1, 1]
    assert probe.difference(expected, found, 1, expected.sum()) is None
    found[[4, EOS_ID]] += [-1, 1]
    assert probe.difference(expected, found, 1, expected.sum()).startswith("2 of")


def test_shards_that_rows_do_not_fill_are_rejected():
    with pytest.raises(ValueError, match="shard_tokens is 100, but must be a multiple of row_tokens, 64"):
        make_corpus(2, 100, 64)
