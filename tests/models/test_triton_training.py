"""The loss curve of training with the triton backend equals that of the chunked backend."""

import pytest
import torch

from dcscale.testing.models import random_ids, random_model, tiny_config

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 4


def losses(backend, dtype):
    config = tiny_config(backend=backend, kv_heads=2)
    model = random_model(config, dtype=dtype).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ids = random_ids(config, 1, 14).to(DEVICE)
    documents = (torch.arange(13, device=DEVICE)[None] > 7).int()
    found = []
    for _ in range(STEPS):
        loss = model(ids[:, :-1], ids[:, 1:], documents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.usefixtures("quick_interpreter")
def test_loss_curves_are_the_same():
    """The error against float64 is at most 3 times that of the chunked backend in float32."""
    truth, chunked, fused = (
        losses("chunked", torch.float64),
        losses("chunked", torch.float32),
        losses("triton", torch.float32),
    )
    assert truth[-1] < 0.9 * truth[0]
    assert (fused - truth).norm() <= 3 * (chunked - truth).norm().clamp(min=1e-6 * truth.norm())
