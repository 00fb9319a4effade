"""When checkpoints are written, what a person is told of them, and what is recorded."""

from types import SimpleNamespace

import pytest

from dcscale.checkpoint import CheckpointError
from dcscale.train.hooks import saving
from dcscale.train.hooks.saving import Saving


class Stand:
    """A trainer of 10 steps, and its checkpoints: each takes ``steps`` steps, those of ``broken`` steps fail then."""

    def __init__(self, steps=1, broken=()):
        self.config = SimpleNamespace(train=SimpleNamespace(steps=10))
        self.state = SimpleNamespace(step=0)
        self.checkpoints = self
        self.latest, self.write_seconds, self.written_bytes = None, 0.0, 0
        self.told, self._steps, self._broken, self._begun = [], steps, broken, None

    @property
    def busy(self):
        return self._begun is not None

    def warn(self, text):
        self.told.append(text)

    def save(self):
        self.wait()
        self._begun = self.state.step

    def poll(self):
        if self.busy and self.state.step >= self._begun + self._steps:
            self.wait()

    def wait(self):
        step, self._begun = self._begun, None
        if step in self._broken:
            raise CheckpointError(f"step {step} was not written")
        if step is not None:
            self.latest, self.write_seconds, self.written_bytes = f"step {step}", 2.0, 1000 + step

    def train(self, hook, steps=10):
        """The record of each step."""
        records = []
        for self.state.step in range(1, steps + 1):
            records.append({})
            hook.add_to_record(self, records[-1])
            hook.after_step(self)
        hook.finish(self, steps == 10)
        return records


def test_what_a_checkpoint_took_is_in_the_first_record_after_it():
    stand = Stand()
    records = stand.train(Saving(4))
    assert [n for n, r in enumerate(records, 1) if "checkpoint_bytes" in r] == [6, 10]
    assert (records[5]["checkpoint_bytes"], records[5]["checkpoint_write_seconds"]) == (1004, 2.0)
    assert [n for n, r in enumerate(records, 1) if "checkpoint_stall_seconds" in r] == [5, 6, 9, 10]
    assert all(r.get("checkpoint_stall_seconds", 1e-9) > 0 for r in records)
    assert not any("checkpoint_failures" in r for r in records)
    assert stand.latest == "step 10"
    assert stand.told == []


@pytest.mark.parametrize(("limit", "told"), [(0.0, True), (60.0, False)])
def test_a_checkpoint_that_comes_too_soon_waits_and_says_so_if_it_was_long(monkeypatch, limit, told):
    monkeypatch.setattr(saving, "WAIT_WORTH_TELLING", limit)
    stand = Stand(steps=99)
    stand.train(Saving(4))
    assert any("step 8 waited 0.0 s for the earlier checkpoint" in text for text in stand.told) == told
    assert stand.latest == "step 10"


def test_a_failure_stops_at_once_or_is_counted():
    stand = Stand(broken=[4])
    with pytest.raises(CheckpointError, match="step 4 was not written"):
        stand.train(Saving(4))
    assert stand.state.step == 5
    stand = Stand(broken=[4])
    records = stand.train(Saving(4, "warn"))
    assert [r["checkpoint_failures"] for r in records] == [0] * 5 + [1] * 5
    assert stand.told == ["step 4 was not written. Training goes on (checkpoint.on_error=warn)"]
    assert stand.latest == "step 10"


def test_a_failed_wait_does_not_keep_the_next_one_from_being_written():
    stand = Stand(steps=99, broken=[4])
    stand.train(Saving(4, "warn"), steps=8)
    assert stand.latest == "step 8"


def test_the_last_one_must_succeed():
    with pytest.raises(CheckpointError, match="step 10 was not written"):
        Stand(broken=[10]).train(Saving(4, "warn"))
