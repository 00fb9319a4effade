"""Sharding, batch splitting, recomputation and backends do not change the result of a step."""

import pytest
import torch

from dcscale.data import BatchLoader
from dcscale.models import DCFormer, initialize
from dcscale.observe import read_metrics
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_all
from dcscale.train.data import open_training_stream
from dcscale.train.optimizer import build_optimizer, learning_rate

pytestmark = pytest.mark.distributed

# All settings must give the losses of the first.
VARIANTS = {
    "plain": ["parallel.zero_stage=0"],
    "whole batch at once": ["parallel.zero_stage=0", "train.micro_batch_size=4"],
    "everything recomputed": ["parallel.zero_stage=1", "train.recompute=block", "train.loss_chunk=7"],
    "sharded and recomputed": ["parallel.zero_stage=3", "train.recompute=block", "train.loss_chunk=7"],
    "small buckets": ["parallel.zero_stage=2", "parallel.bucket_size=1000"],
    "reference attention": ["parallel.zero_stage=1", "model.backend=reference"],
}
BY_HAND = [
    # Strong clipping, and a large epsilon: Adam alone would be invariant to the scale of the gradients.
    *("train.gradient_clipping=0.05", "optimizer.eps=0.01", "optimizer.learning_rate=0.05"),
    *("train.micro_batch_size=1", "optimizer.rules=[{match: '*.compose.*', lr_scale: 0.5, weight_decay: 0.3}]"),
]
TIED = ["model.tied_embeddings=true", "model.multi_gate=4", "optimizer.rules=[{match: '*.compose.*', lr_scale: 0.5}]"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("runs")
    runs = {(name, False): settings for name, settings in VARIANTS.items()}
    runs |= {(f"zero{stage}", True): [f"parallel.zero_stage={stage}", *TIED] for stage in range(4)}
    runs["by hand", False] = BY_HAND
    configs = {
        key: tiny_config(folder / f"{number}", shards, "train.steps=4", "validation.interval=0", *settings)
        for number, (key, settings) in enumerate(runs.items())
    }
    run_distributed(train_all, 2, list(configs.values()))
    return {
        key: [(r["loss"], r["grad_norm"]) for r in read_metrics(folder / f"{number}" / "metrics.jsonl")]
        for number, key in enumerate(configs)
    }


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_same_losses_and_gradient_norms(losses, name):
    for step, (found, expected) in enumerate(zip(losses[name, False], losses["plain", False], strict=True)):
        assert found == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tied_embeddings_and_rules_under_every_stage(losses, stage):
    expected = losses["zero0", True]
    assert expected != losses["plain", False]
    for found, wanted in zip(losses[f"zero{stage}", True], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_step_is_that_of_a_plain_loop_over_whole_batches(losses, shards, tmp_path):
    config = tiny_config(tmp_path, shards, "train.steps=4", *BY_HAND)
    model = DCFormer(config.model)
    initialize(model, config.model, config.train.seed)
    optimizer = build_optimizer(model, config.optimizer, fused=False)
    stream = open_training_stream(config)
    loader = BatchLoader(stream, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
    for step, ((batch,), found) in enumerate(zip(loader.steps(), losses["by hand", False])):
        optimizer.zero_grad()
        loss = model(batch.input_ids, batch.targets, batch.document_ids) / batch.target_count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(config.schedule, 0.05, 4, step)
        optimizer.step()
        assert found == pytest.approx((loss.item(), norm.item()), rel=1e-5), step
    assert step == 3
