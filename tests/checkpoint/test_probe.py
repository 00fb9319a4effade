"""The logits of a probe batch: which differences are rounding, and which are errors."""

from dataclasses import replace

import pytest
import torch

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.probe import probe_tokens, read_probe, take_probe
from dcscale.models import DCFormer
from dcscale.testing.models import random_model, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocab_size=257), dtype=torch.float32)


def take(model, dtype=torch.float32):
    return take_probe(model, probe_tokens(model.config.vocab_size), dtype, CPU)


def test_the_same_tokens_in_every_run(model):
    ids, positions = probe_tokens(257)
    assert ids.shape == (2, 320)
    assert ids[0, :5].tolist() == probe_tokens(257)[0][0, :5].tolist()
    assert (int(ids.min()), int(ids.max())) == (0, 256)
    assert positions.tolist() == [80, 319]


def test_a_probe_on_disk(model, tmp_path):
    assert read_probe(tmp_path) is None
    probe = take(model)
    (tmp_path / "probe.safetensors").write_bytes(probe.to_bytes())
    back = read_probe(tmp_path)
    assert back.input_ids_BT.equal(probe.input_ids_BT)
    assert back.logits_BV.equal(probe.logits_BV)
    assert (back.dtype, back.device) == (torch.float32, "cpu")
    again = take_probe(model, (back.input_ids_BT, back.positions_B), torch.float32, CPU)
    assert again.logits_BV.equal(back.logits_BV)
    (tmp_path / "probe.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"probe.safetensors cannot be read"):
        read_probe(tmp_path)


def test_it_holds_the_logits_of_a_full_forward(model):
    probe = take(model)
    with torch.no_grad():
        logits = model(probe.input_ids_BT)
    rows = torch.arange(2)
    torch.testing.assert_close(probe.logits_BV, logits[rows, probe.positions_B], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_limit_depends_on_the_dtype(model, dtype, limit):
    probe = replace(take(model), dtype=dtype)
    for factor, differs in ((0.9, False), (1.1, True)):
        other = replace(probe, logits_BV=probe.logits_BV * (1 + factor * limit))
        assert (probe.difference(other) is not None) == differs
        assert probe.comparable(other)


def test_another_dtype_has_the_larger_limit_and_is_not_comparable(model):
    probe = take(model)
    other = replace(probe, logits_BV=probe.logits_BV * 1.04, dtype=torch.bfloat16)
    assert probe.difference(other) is other.difference(probe) is None
    assert not probe.comparable(other)
    assert not probe.comparable(replace(probe, device="cuda"))
    other = replace(other, logits_BV=probe.logits_BV * 1.06)
    assert probe.difference(other) == (
        "the logits of its probe batch differ by 6.0e-02 of their norm, rounding explains at most 5e-02 "
        "(saved with float32 on cpu, loaded with bfloat16 on cpu)"
    )


def test_bfloat16_is_within_its_limit(model):
    rounded = DCFormer(model.config)
    rounded.load_state_dict(model.state_dict())
    here = take(rounded.to(torch.bfloat16), torch.bfloat16)
    assert not here.logits_BV.equal(take(model).logits_BV)
    assert take(model).difference(here) is None


@pytest.mark.parametrize("name", ["embedding.weight", "output.weight", "norm.weight", "blocks.0.attention.compose"])
def test_a_wrong_tensor_is_detected(model, name):
    probe = take(model)
    wrong = DCFormer(model.config)
    wrong.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in (p for n, p in wrong.named_parameters() if n.startswith(name)):
            parameter.add_(parameter.flip(0).roll(1, -1) + 0.1)
    assert probe.difference(take(wrong)) is not None


def test_nan_is_a_difference(model):
    probe = take(model)
    assert probe.difference(replace(probe, logits_BV=probe.logits_BV * float("nan"))) is not None
