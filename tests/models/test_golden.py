"""The model against outputs of the official code (tests/golden/models/README.md)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcscale.models import DCFormer
from dcscale.models.blocks import Attention
from dcscale.ops import rope_table
from dcscale.testing.models import GoldenCase, load_attention_case, load_model_case

DATA = Path(__file__).parents[1] / "golden" / "models"

CASES = {  # as stated in each case's README: keys that a local layer's query sees, GELU of the compose projection
    "dcformer_train_LGLL_jax": {"visible_keys": 16, "gelu": "tanh"},
    "dcformer_train_LGLL_mgate": {"visible_keys": 17, "gelu": "erf"},
    "dcpythia_train_repaired": {"visible_keys": 16, "gelu": "erf"},
}
# In float64 the difference is the error of upstream's float32: up to 8.1e-5 in logits and 5.6e-5 in gradients.
LOGITS_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-4}
"""Largest absolute error; logits are of the order 1."""
GRADIENT_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-4}
"""Norm of the error over the norm of the gradient, for every parameter."""


def build(case: GoldenCase, dtype: torch.dtype, **changes) -> DCFormer:
    model = DCFormer(replace(case.config, **changes)).to(dtype)
    model.load_state_dict(case.weights, strict=True)
    return model


def next_tokens(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1)


def assert_gradients(module: torch.nn.Module, expected: dict[str, torch.Tensor], tolerance: float, prefix: str = ""):
    gradients = {prefix + name: parameter.grad for name, parameter in module.named_parameters()}
    errors = {
        name: float((gradients[name].double() - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name, dtype, backend):
    case = load_model_case(DATA / name, **CASES[name])
    model = build(case, dtype, backend=backend)
    input_ids = case.values["input_ids"]

    logits = model(input_ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), case.values["logits"].double(), atol=LOGITS_TOLERANCE[dtype], rtol=0)

    loss = model(input_ids, next_tokens(input_ids)) / input_ids[:, 1:].numel()
    assert loss.item() == pytest.approx(float(case.values["loss"]), rel=2e-6)
    loss.backward()
    assert_gradients(model, case.gradients, GRADIENT_TOLERANCE[dtype])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_with_a_cache(dtype):
    case = load_model_case(DATA / "dcformer_infer_LG_jax", visible_keys=16, gelu="tanh")
    model = build(case, dtype)
    cache, ids = model.new_cache(), case.values["input_ids"]
    prompt = case.values["logits_prefill"].shape[1]
    logits = [model(ids[:, :prompt], cache=cache)]
    logits += [model(token, cache=cache) for token in ids[:, prompt:].split(1, dim=1)]
    expected = torch.cat([case.values["logits_prefill"], case.values["logits_decode"]], dim=1)
    torch.testing.assert_close(
        torch.cat(logits, dim=1).double(), expected.double(), atol=LOGITS_TOLERANCE[dtype], rtol=0
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients_cover_every_kind_of_parameter(name):
    case = load_model_case(DATA / name, **CASES[name])
    of_layers_0_and_1 = {key for key in case.weights if not key.startswith(("blocks.2.", "blocks.3."))}
    assert case.gradients.keys() == of_layers_0_and_1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dcformer_train_LGLL_jax", {"visible_keys": 17, "gelu": "tanh"}),
        ("dcformer_train_LGLL_jax", {"visible_keys": 16, "gelu": "erf"}),
        ("dcformer_train_LGLL_mgate", {"visible_keys": 16, "gelu": "erf"}),
        ("dcpythia_train_repaired", {"visible_keys": 16, "gelu": "tanh"}),
    ],
)
def test_wrong_windows_and_gelu_change_the_logits(name, wrong):
    case = load_model_case(DATA / name, **wrong)
    with torch.no_grad():
        logits = build(case, torch.float64)(case.values["input_ids"])
    assert (logits - case.values["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_layer_of_upstream_jax(dtype):
    case = load_attention_case(DATA / "jax_attn_local16")
    layer = Attention(case.config, window=case.config.windows[0]).to(dtype)
    prefix = "blocks.0.attention."
    layer.load_state_dict({name.removeprefix(prefix): weight for name, weight in case.weights.items()}, strict=True)
    x = case.values["x"].to(dtype).requires_grad_()

    y = layer(x, rope_table(x.shape[1], case.config.head_dim, case.config.rope_base))
    torch.testing.assert_close(y.double(), case.values["y"].double(), atol=2e-5, rtol=0)

    (y * case.values["cot"]).sum().backward()
    assert_gradients(layer, case.gradients, 1e-5, prefix)
    assert (x.grad - case.values["grad.x"]).norm() / case.values["grad.x"].norm() < 1e-5
    assert case.gradients.keys() == case.weights.keys()
