"""How a step is computed must not change what is computed: sharding, cutting, recomputing, compiling."""

import pytest

from dcscale.observe import read_metrics
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import make_shards, tiny_config, train_all

pytestmark = pytest.mark.distributed

# Settings that all must give the losses of the first.
VARIANTS = {
    "plain": ["parallel.zero_stage=0"],
    "whole batch at once": ["parallel.zero_stage=0", "train.micro_batch_size=4"],
    "everything recomputed": ["parallel.zero_stage=1", "train.recompute=block", "train.loss_chunk=7"],
    "sharded and recomputed": ["parallel.zero_stage=3", "train.recompute=block", "train.loss_chunk=7"],
    "small buckets": ["parallel.zero_stage=2", "parallel.bucket_elements=1000"],
    "reference attention": ["parallel.zero_stage=1", "model.backend=reference"],
}
TIED = ["model.tied_embeddings=true", "model.multi_gate=4", "optimizer.rules=[{match: '*.compose.*', lr_scale: 0.5}]"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shards = make_shards(tmp_path_factory.mktemp("data") / "shards")
    runs = {(name, False): settings for name, settings in VARIANTS.items()}
    runs |= {(f"zero{stage}", True): [f"parallel.zero_stage={stage}", *TIED] for stage in range(4)}
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
