"""Weights as the Triton kernels want them: every number where the layout says, and back."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton.packing import Frame, pack, unpack
from dcscale.ops.compose.triton.tiles import Launch
from dcscale.testing.staged import DEVICE

pytestmark = pytest.mark.usefixtures("quick_interpreter")

FRAMES = {
    "from the first position": Frame(0, 32, 16),
    "from before the first position": Frame(-16, 48, 16),
}
BATCH, POSITIONS = 2, 21


def weights(rank, heads, gate=True):
    """w1, w2 and the gate, and the empty tensor that names their sizes."""
    torch.manual_seed(0)
    shapes = [(BATCH, POSITIONS, rank, heads)] * 2 if rank else []
    factors = [torch.randn(*shape, device=DEVICE) for shape in shapes] or [None, None]
    rows = torch.empty(BATCH, POSITIONS, 0, heads, device=DEVICE)
    return (*factors, torch.randn(BATCH, POSITIONS, heads, device=DEVICE) if gate else None), rows


def expected(tensors, rows, frame, add_one):
    """[B, blocks, H, 2 R + 1, block]."""
    w1, w2, gate = tensors
    lines = [] if w1 is None else [w1, w2]
    if gate is not None or add_one:
        gate = torch.zeros(BATCH, POSITIONS, rows.shape[3], device=DEVICE) if gate is None else gate
        lines.append(gate[:, :, None])
    padded = torch.zeros(BATCH, frame.positions, rows.shape[3], sum(x.shape[2] for x in lines), device=DEVICE)
    padded[:, -frame.origin : POSITIONS - frame.origin] = torch.cat(lines, 2).transpose(2, 3)
    if add_one:
        padded[..., -1] += 1
    return padded.unflatten(1, (frame.blocks, frame.block)).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize(
    ("rank", "heads", "gate", "add_one"), [(2, 33, True, True), (1, 3, False, False), (0, 2, False, True)]
)
def test_weights_are_packed_in_blocks(frame, rank, heads, gate, add_one):
    tensors, rows = weights(rank, heads, gate)
    side = pack(tensors, rows, frame, add_one, Launch.run)
    assert (side.rank, side.gate, side.frame) == (rank, gate, frame)
    assert torch.equal(side.weights, expected(tensors, rows, frame, add_one))


def test_weights_of_any_memory_order_are_packed():
    tensors, rows = weights(2, 3)
    shuffled = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tensors]
    frame = FRAMES["from before the first position"]
    found = pack(shuffled, rows, frame, True, Launch.run).weights
    assert torch.equal(found, pack(tensors, rows, frame, True, Launch.run).weights)


def test_a_side_without_weights_is_empty():
    tensors, rows = weights(0, 2, gate=False)
    launches = []
    side = pack(tensors, rows, FRAMES["from the first position"], False, launches.append)
    assert side.weights.numel() == 0
    assert unpack(side, side.weights, rows, 1.0, launches.append) == (None, None, None)
    assert not launches


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize(("rank", "heads", "gate"), [(2, 33, True), (1, 3, False), (0, 2, True)])
def test_gradients_are_unpacked_in_the_layout_of_the_weights(frame, rank, heads, gate):
    """Scaled. There may be more rows than weights, and blocks of another size."""
    tensors, rows = weights(rank, heads, gate)
    side = pack(tensors, rows, frame, False, Launch.run)
    sums = side.weights.unflatten(4, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    more = torch.cat([sums, torch.full_like(sums[..., :1, :], torch.nan)], 3).contiguous()
    found = unpack(side, more, rows, 0.5, Launch.run)
    for x, original in zip(found, tensors):
        if original is None:
            assert x is None
        else:
            assert x.is_contiguous()
            assert torch.equal(x, 0.5 * original)
