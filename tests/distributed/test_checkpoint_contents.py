"""Contents of real checkpoints, in every ZeRO stage and precision: weights, probe, provenance; and their checks."""

import json
import random
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dcscale
from dcscale.checkpoint import CheckpointError, find_checkpoint
from dcscale.checkpoint.layout import MARKER, corrupt_reason, read_marker, seal
from dcscale.checkpoint.probe import read_probe
from dcscale.convert import ConversionError
from dcscale.evaluation import open_trained
from dcscale.observe import Console
from dcscale.parallel import KINDS, discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_here, whole_weights
from dcscale.train import build_trainer

CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]

pytestmark = pytest.mark.distributed


def _train_two_steps(configs):
    """Returns for each run whether the saved weights are those of the engine."""
    same = []
    for config in configs:
        trainer, _ = train_here(config)
        weights = whole_weights(trainer.engine)
        assert_snapshot_is_a_copy(trainer)
        if trainer.environment.is_main:
            saved = load_file(trainer.latest_checkpoint / "weights" / "model-00001.safetensors")
            same.append(saved.keys() == weights.keys() and all(saved[name].equal(weights[name]) for name in saved))
    return same


def assert_snapshot_is_a_copy(trainer):
    engine, batch = trainer.engine, trainer.latest_batch
    snapshot = engine.snapshot()
    before = {place: tensor.clone() for place, tensor in snapshot.tensors.items()}
    engine.forward_backward((batch.input_ids, batch.targets, batch.document_ids), 0.1, last=True)
    engine.update(0.1, torch.zeros((), dtype=torch.float64), lambda loss, norm: True)
    after = engine.snapshot().tensors
    assert all(tensor.equal(before[place]) for place, tensor in snapshot.tensors.items())
    for kind in KINDS:
        assert not all(after[place].equal(before[place]) for place in before if place[1] == kind)


def settings(run, shards, stage, precision, *more):
    quick = ["validation.interval=2", "log.compose_interval=0", "train.stop_after=2"]
    return tiny_config(run, shards, f"parallel.zero_stage={stage}", f"train.precision={precision}", *quick, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("runs")
    configs = [settings(folder / f"{stage}-{precision}", shards, stage, precision) for stage, precision in CASES]
    same, _ = run_distributed(_train_two_steps, 2, configs)
    return folder, dict(zip(CASES, same))


@pytest.mark.parametrize("case", CASES)
def test_saved_weights_are_those_of_the_model(runs, case):
    folder, same = runs
    assert same[case]
    checkpoint = find_checkpoint(folder / "{}-{}".format(*case))
    assert corrupt_reason(checkpoint) is None
    assert {file.sha256 is None for file in read_marker(checkpoint).values()} == {False}


@pytest.mark.parametrize("case", CASES)
def test_the_saved_model_computes_the_probe_without_deepspeed(runs, case):
    checkpoint = find_checkpoint(runs[0] / "{}-{}".format(*case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = open_trained(checkpoint).load(torch.device("cpu"))
    probe = read_probe(checkpoint)
    with torch.no_grad():
        assert probe.logits_BV.equal(model(probe.input_ids_BT, logits_at_B=probe.positions_B))


def test_content_of_the_state(runs):
    state = json.loads((find_checkpoint(runs[0] / "3-bf16") / "state.json").read_text())
    assert state["versions"]["dcscale"] == dcscale.__version__
    assert set(state["git"] or {"commit": "", "dirty": False}) == {"commit", "dirty"}
    assert state["validation_loss"] == state["hooks"]["validation"]["last"]["validation_loss"]
    assert set(state["hooks"]) >= {"validation", "throughput", "saving"}
    assert (state["step"], state["world_size"], state["zero_stage"]) == (2, 2, 3)


def _resume(config):
    """The console lines of the start, or its error."""
    environment = discover()
    start_distributed(environment, 1)
    console = Console(enabled=environment.is_main)
    lines = []
    console.line = lines.append
    try:
        build_trainer(config, environment, console).close()
    except CheckpointError as error:
        return str(error)
    return "\n".join(lines)


def _resume_all(configs):
    return [_resume(config) for config in configs]


def test_the_probe_matches_after_a_change_of_ranks_stage_and_precision(runs, shards, tmp_path):
    """From 2 ranks to 1, to every other stage and precision, each as a branch of a run."""
    branches = [
        settings(
            tmp_path / f"{number}-{stage}-{precision}",
            shards,
            stage,
            precision,
            f"checkpoint.resume={find_checkpoint(runs[0] / '{}-{}'.format(*CASES[-1 - number]))}",
        )
        for number, (stage, precision) in enumerate(CASES)
    ]
    (outputs,) = run_distributed(_resume_all, 1, branches)
    for text in outputs:
        assert "resuming   from" in text
        assert "probe batch" not in text


def changed_copy(runs, tmp_path, case, change):
    """A copy of a run whose checkpoint was changed and sealed again, so that its checksums match."""
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "{}-{}".format(*case), run)
    checkpoint = find_checkpoint(run)
    change(checkpoint)
    (checkpoint / MARKER).unlink()
    seal(checkpoint)
    return run, checkpoint


def wrong_optimizer(checkpoint):
    path = checkpoint / "optimizer" / "rank-00001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if ":master:" in key:
            tensors[key] = tensor.flip(0) + 0.01
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("case", [(1, "fp32"), (3, "bf16")])
def test_a_model_with_other_logits_is_rejected_on_all_ranks(runs, shards, tmp_path, case):
    run, checkpoint = changed_copy(runs, tmp_path, case, wrong_optimizer)
    for output in run_distributed(_resume, 2, settings(run, shards, *case)):
        expected = (
            f"{checkpoint} was loaded, but its model does not compute the logits it had .* on 2 of 2 ranks.*allow_other"
        )
        assert re.search(expected, output), output
    allowed = settings(run, shards, *case, "checkpoint.allow_other_logits=true")
    assert "the logits of its probe batch differ" in run_distributed(_resume, 2, allowed)[0]
    other_type = settings(run, shards, case[0], "bf16" if case[1] == "fp32" else "fp32")
    output = run_distributed(_resume, 2, other_type)[0]
    assert re.search("warning .*the logits of its probe batch differ", output), output


def test_a_checkpoint_without_a_probe_resumes_with_a_warning(runs, shards, tmp_path):
    run, _ = changed_copy(runs, tmp_path, (1, "fp32"), lambda folder: (folder / "probe.safetensors").unlink())
    (output,) = run_distributed(_resume, 1, settings(run, shards, 1, "fp32"))
    assert "has no probe batch, so the logits of the loaded model were not checked" in output
    assert open_trained(run).load(torch.device("cpu")) is not None


def test_a_trained_model_is_checked_when_it_is_loaded(runs, tmp_path):
    def wrong(checkpoint):
        path = checkpoint / "weights" / "model-00001.safetensors"
        tensors = load_file(path)
        tensors["output.weight"] = tensors["output.weight"].flip(0)
        save_file(tensors, path, metadata={"format": "pt"})

    run, checkpoint = changed_copy(runs, tmp_path, (1, "fp32"), wrong)
    with pytest.raises(ConversionError, match="computes other logits than when it was saved: the logits"):
        open_trained(run).load(torch.device("cpu"))
    with pytest.warns(UserWarning, match="computes other logits than when it was saved: the logits"):
        open_trained(run).load(torch.device("cpu"), torch.bfloat16)
    open_trained(run).load(torch.device("cpu"), torch.float64)  # no saved logits of this dtype
    (checkpoint / "config.yaml").write_bytes((checkpoint / "config.yaml").read_bytes().replace(b"seed: 0", b"seed: 1"))
    with pytest.raises(ConversionError, match=r"corrupt: .*config.yaml has the SHA-256 .*; name another one"):
        open_trained(run).load(torch.device("cpu"))


def _random_states(config):
    """Whether training leaves the states of all global random number generators unchanged."""

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]

    environment = discover()
    start_distributed(environment, 1)
    trainer = build_trainer(config, environment, Console(enabled=False))
    before = states()
    trainer.fit()
    trainer.close()
    return before == states()


def test_training_uses_no_global_random_number_generator(shards, tmp_path):
    config = tiny_config(
        tmp_path / "run", shards, "samples.interval=2", "samples.new_tokens=4", "checkpoint.interval=2"
    )
    assert run_distributed(_random_states, 1, config) == [True]
