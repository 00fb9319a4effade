"""A run that starts from the weights of a converted model has that model's loss at its first step, in any stage."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers

from dcscale.checkpoint.training_state import TrainingStateReader
from dcscale.convert import convert
from dcscale.data import BatchLoader
from dcscale.observe import read_metrics
from dcscale.parallel.zero_state import MASTER
from dcscale.testing.distributed import run_distributed
from dcscale.testing.models import tensors_of
from dcscale.testing.runs import tiny_config, train_all
from dcscale.train.data import open_training_stream

pytestmark = pytest.mark.distributed

STAGES = range(4)
RESUMED = 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """A tiny Qwen2 converted to a DCFormer, runs of 2 ranks that start from it, and one of them resumed."""
    root = tmp_path_factory.mktemp("init")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = transformers.Qwen2Config(vocab_size=257, intermediate_size=48, max_position_embeddings=32, **sizes)
    torch.manual_seed(0)
    source = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(5)
    source.save_pretrained(root / "source")
    convert(root / "source", root / "model", "dcscale")

    def config(stage, steps, *more, name=None):
        return tiny_config(
            root / (name or f"zero{stage}"),
            shards,
            f"checkpoint.init_from={root / 'model'}",
            f"parallel.zero_stage={stage}",
            f"train.stop_after={steps}",
            "data.document_mask=false",
            "validation.interval=0",
            "model.kv_heads=2",
            "model.qkv_bias=true",
            "model.qk_norm=false",
            "model.windows=[null]",
            "log.compose_interval=0",
            *more,
        )

    still = ("train.precision=bf16", "optimizer.learning_rate=1e-12")
    run_distributed(
        train_all,
        2,
        [*(config(stage, 2) for stage in STAGES), config(RESUMED, 3), config(2, 1, *still, name="still")],
    )
    return root, source, config(0, 2)


def test_the_first_loss_is_the_sources(runs):
    root, source, config = runs
    loader = BatchLoader(
        open_training_stream(config),
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        prefetch_steps=0,
    )
    (batch,) = next(iter(loader.steps(0)))
    with torch.no_grad():
        logits = source(batch.input_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100).item()
    assert expected > 6  # not that of an untrained model: log(257) = 5.5
    for stage in STAGES:
        first = read_metrics(root / f"zero{stage}" / "metrics.jsonl")[0]
        assert first["step"] == 1
        assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_compose_leaves_the_identity(runs):
    root, *_ = runs
    before = tensors_of(root / "model")
    for stage in STAGES:
        after = tensors_of(root / f"zero{stage}" / "checkpoints" / "step-00000002")
        assert after.keys() == before.keys()
        assert all(not torch.equal(after[name], before[name]) for name in before if ".compose." in name)


def test_the_run_records_its_initial_weights_and_resumes_from_its_own(runs):
    root, *_ = runs
    run = root / f"zero{RESUMED}"
    for step in (2, 3):
        state = json.loads((run / "checkpoints" / f"step-0000000{step}" / "state.json").read_text())
        assert state["initial_weights"] == str((root / "model").resolve())
        assert state["step"] == step
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]


def test_no_weight_is_rounded_on_the_way_to_the_optimizer(runs):
    """The float32 weights of a bfloat16 run are the source's values. (This run has a learning rate of almost 0.)"""
    root, *_ = runs
    masters = TrainingStateReader(root / "still" / "checkpoints" / "step-00000001" / "optimizer")
    for name, weight in tensors_of(root / "model").items():
        target = torch.empty(weight.numel())
        masters.fill({(name, MASTER): (0, target)})
        torch.testing.assert_close(target, weight.flatten(), atol=1e-8, rtol=1e-6)
