"""When checkpoints are saved, what is recorded, and which warnings are printed."""

from types import SimpleNamespace

import pytest

from dcscale.checkpoint import CheckpointError
from dcscale.train.hooks.saving import Saving


class FakeTrainer:
    """A trainer of 10 steps and its checkpointer. A checkpoint takes ``steps`` steps, ``failing`` ones fail."""

    def __init__(self, steps=1, failing=()):
        self.config = SimpleNamespace(train=SimpleNamespace(steps=10))
        self.state = SimpleNamespace(step=0)
        self.environment = SimpleNamespace(is_main=True)
        self.checkpointer = self.events = self
        self.save_requested = False
        self.latest, self.write_seconds, self.written_bytes = None, 0.0, 0
        self.written = []
        self.warnings, self._steps, self._failing, self._saving = [], steps, failing, None

    @property
    def busy(self):
        return self._saving is not None

    def warn(self, text):
        self.warnings.append(text)

    def write(self, kind, **facts):
        self.written.append({"event": kind, **facts})

    def save(self):
        self.wait()
        self._saving = self.state.step

    def poll(self):
        if self.busy and self.state.step >= self._saving + self._steps:
            self.wait()

    def wait(self):
        step, self._saving = self._saving, None
        if step in self._failing:
            raise CheckpointError(f"step {step} was not written")
        if step is not None:
            self.latest, self.write_seconds, self.written_bytes = f"step {step}", 2.0, 1000 + step

    def train(self, hook, steps=10):
        """Returns the record of each step."""
        records = []
        for self.state.step in range(1, steps + 1):
            records.append({})
            hook.add_to_record(self, records[-1])
            hook.after_step(self)
        hook.finish(self, steps == 10)
        return records


def test_write_time_and_size_are_in_the_first_record_after_the_checkpoint():
    trainer = FakeTrainer()
    records = trainer.train(Saving(4))
    assert [n for n, r in enumerate(records, 1) if "checkpoint_bytes" in r] == [6, 10]
    assert (records[5]["checkpoint_bytes"], records[5]["checkpoint_write_seconds"]) == (1004, 2.0)
    assert [n for n, r in enumerate(records, 1) if "checkpoint_stall_seconds" in r] == [5, 6, 9, 10]
    assert all(r.get("checkpoint_stall_seconds", 1e-9) > 0 for r in records)
    assert not any("checkpoint_failures" in r for r in records)
    assert trainer.latest == "step 10"
    assert trainer.warnings == []
    assert trainer.written == [
        {"event": "checkpoint", "step": step, "checkpoint": saved, "seconds": 2.0, "bytes": size}
        for step, saved, size in [(5, "step 4", 1004), (9, "step 8", 1008), (10, "step 10", 1010)]
    ]


@pytest.mark.parametrize(("limit", "warned"), [(0.0, True), (60.0, False)])
def test_a_checkpoint_waits_for_the_previous_one_and_warns_of_a_long_wait(limit, warned):
    trainer = FakeTrainer(steps=99)
    trainer.train(Saving(4, warn_after_seconds=limit))
    assert any("step 8 waited 0.0 s for the previous checkpoint" in text for text in trainer.warnings) == warned
    assert trainer.latest == "step 10"


def test_a_failure_raises_or_is_counted():
    trainer = FakeTrainer(failing=[4])
    with pytest.raises(CheckpointError, match="step 4 was not written"):
        trainer.train(Saving(4))
    assert trainer.state.step == 5
    trainer = FakeTrainer(failing=[4])
    records = trainer.train(Saving(4, "warn"))
    assert [r["checkpoint_failures"] for r in records] == [0] * 5 + [1] * 5
    assert trainer.warnings == ["step 4 was not written. Training continues (checkpoint.on_error=warn)"]
    failure = {"event": "checkpoint_failure", "step": 5, "error": "step 4 was not written"}
    assert [event["event"] for event in trainer.written] == ["checkpoint_failure", "checkpoint", "checkpoint"]
    assert trainer.written[0] == failure
    assert trainer.latest == "step 10"


def test_before_a_rollback_it_waits_for_the_checkpoint_being_written():
    trainer, hook = FakeTrainer(steps=99, failing=[3]), Saving(0, "warn")
    for step, latest in ((2, "step 2"), (3, "step 2")):
        trainer.state.step = step
        trainer.save()
        hook.before_rollback(trainer)
        assert (trainer.busy, trainer.latest) == (False, latest)
    assert [event["event"] for event in trainer.written] == ["checkpoint", "checkpoint_failure"]
    trainer.save()
    with pytest.raises(CheckpointError, match="step 3 was not written"):
        Saving(0).before_rollback(trainer)


def test_a_failed_checkpoint_does_not_prevent_the_next_one():
    trainer = FakeTrainer(steps=99, failing=[4])
    trainer.train(Saving(4, "warn"), steps=8)
    assert trainer.latest == "step 8"


def test_the_last_checkpoint_must_succeed():
    with pytest.raises(CheckpointError, match="step 10 was not written"):
        FakeTrainer(failing=[10]).train(Saving(4, "warn"))
