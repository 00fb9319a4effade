"""A step whose global batch has nothing to predict changes no weight, has no loss and is counted, on every rank."""

import json
from itertools import pairwise

import pytest

from dcscale.data import BatchLoader
from dcscale.observe import Console, read_metrics
from dcscale.parallel import discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, whole_weights, write_token_shards
from dcscale.train import build_trainer, write_summary
from dcscale.train.data import open_training_stream
from dcscale.train.hooks import Hook
from dcscale.train.optimizer import learning_rate

pytestmark = pytest.mark.distributed

TARGETS = [0, 2, 0, 0, 3, 0, 0]
"""Targets of each step."""

STAGES = [0, 1, 2, 3]


class Weights(Hook):
    """Keeps the sum of all weights after each step, beginning with the initial ones."""

    def __init__(self, trainer):
        self.sums = []
        self.after_step(trainer)

    def after_step(self, trainer):
        self.sums.append(sum(float(weight.double().abs().sum()) for weight in whole_weights(trainer.engine).values()))


class Lines(Console):
    """Keeps what it would print."""

    def __init__(self):
        super().__init__(enabled=False)
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)


def train_starts(configs):
    """Trains each config on this rank; returns the sums of the weights and the warnings of each."""
    found = []
    for config in configs:
        environment, console = discover(), Lines()
        start_distributed(environment, 1)
        trainer = build_trainer(config, environment, console)
        weights = Weights(trainer)
        trainer.hooks.insert(0, weights)
        write_summary(trainer, trainer.fit())
        trainer.close()
        found.append((weights.sums, [line for line in console.lines if " has no target" in line]))
    return found


def config_of(folder, name, *more):
    data = ["validation.interval=0", "data.sequence_length=8", "train.global_batch_size=2", "train.micro_batch_size=1"]
    train = [f"train.steps={len(TARGETS)}", "train.seed=4", "optimizer.weight_decay=0.5", "log.compose_interval=1"]
    return tiny_config(folder / name, folder, *data, *train, "model.layers=1", "model.windows=[8]", *more)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Folder of the runs, and (sums, warnings) of each start by rank: a run per stage, one that stops, and its resume.

    The documents are single tokens, but for one.
    """
    folder = tmp_path_factory.mktemp("targets")
    documents = [[[number] for number in range(40)], [[1, 2, 3, 4, 5, 6], *([number] for number in range(34))]]
    write_token_shards(folder / "train", documents)
    configs = [config_of(folder, f"zero{stage}", f"parallel.zero_stage={stage}") for stage in STAGES]
    stopping = ["parallel.zero_stage=1", "log.interval=3"]
    configs += [config_of(folder, "stopped", *stopping, "train.stop_after=4"), config_of(folder, "stopped", *stopping)]
    stream = open_training_stream(configs[0])
    loader = BatchLoader(stream, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1)
    assert [batch.target_count for (batch,), _ in zip(loader.steps(), TARGETS)] == TARGETS
    return folder, run_distributed(train_starts, 2, configs)


def records_of(folder, name):
    return [record for record in read_metrics(folder / name / "metrics.jsonl") if "lr" in record]


@pytest.mark.parametrize("stage", STAGES)
def test_only_steps_with_targets_change_weights_and_have_a_loss(starts, stage):
    folder, of_ranks = starts
    for sums, warnings in (of_rank[stage] for of_rank in of_ranks):
        assert [before != after for before, after in pairwise(sums)] == [count > 0 for count in TARGETS]
        assert len(warnings) == 1
        assert warnings[0].startswith("warning    step 1 has no target to predict, so it has no loss and changes no w")
    records = records_of(folder, f"zero{stage}")
    assert [record["loss"] is not None for record in records] == [count > 0 for count in TARGETS]
    assert [record["grad_norm"] is not None for record in records] == [count > 0 for count in TARGETS]
    assert [record["steps_without_targets"] for record in records] == [1, 1, 2, 3, 3, 4, 5]
    assert [record["tokens"] for record in records] == [0, 16, 16, 16, 32, 32, 32]
    assert [record["tokens_per_second"] > 0 for record in records] == [count > 0 for count in TARGETS]
    config = config_of(folder, "any")
    expected = [learning_rate(config.schedule, config.optimizer.learning_rate, 7, step) for step in range(7)]
    assert [record["lr"] for record in records] == expected
    losses = [record["loss"] for record in records]
    assert [losses[1], losses[4]] == pytest.approx([records_of(folder, "zero0")[i]["loss"] for i in (1, 4)], rel=1e-5)
    summary = json.loads((folder / f"zero{stage}/summary.json").read_text())
    assert (summary["steps_without_targets"], summary["first_loss"], summary["last_loss"]) == (5, losses[1], losses[4])


def test_a_resume_after_such_a_step_continues_the_count_and_the_loss(starts):
    folder, of_ranks = starts
    whole, records = records_of(folder, "zero1"), records_of(folder, "stopped")
    assert [record["step"] for record in records] == [3, 6, 7]
    assert [record["loss"] for record in records] == [whole[1]["loss"], whole[4]["loss"], None]
    assert [record["steps_without_targets"] for record in records] == [2, 4, 5]
    for of_rank in of_ranks:
        assert of_rank[4][0] == of_rank[1][0][:5]
        assert of_rank[5] == (of_rank[1][0][4:], [])
