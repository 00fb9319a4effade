"""The Triton backend as an operator of torch: what autograd, checkpointing, torch.compile and callers see of it."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dcscale.ops import ComposeWeights, compose_attention
from dcscale.ops.compose.triton import op
from dcscale.testing.attention import WEIGHTS, arguments, assert_same, random_inputs

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.testing.staged import DEVICE

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def inputs_on_device(dtype=torch.float32, **options):
    return random_inputs(**{"batch": 1, "queries": 9, "heads": 2, **options}).to(dtype, DEVICE)


def attend(q, k, v, pre, post, **options):
    return compose_attention(q, k, v, pre, post, **options, backend="triton")


def test_tensors_in_any_memory_order():
    inputs = inputs_on_device(batch=2, documents=6)
    shuffled = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.tensors.items()}
    documents = inputs.options["document_ids"].long().T.contiguous().T
    other = replace(inputs.with_tensors(**shuffled), options={"document_ids": documents})
    assert not any(x.is_contiguous() for x in (*shuffled.values(), documents))
    assert_same(other.run("triton"), inputs.run("triton"), tolerance=0)


def test_a_gradient_that_is_the_same_for_all_queries():
    """As of a sum: without memory of its own for each query."""
    inputs = inputs_on_device()
    inputs.cotangent = inputs.cotangent[:, :1].expand(-1, 9, -1, -1)
    same = replace(inputs, cotangent=inputs.cotangent.contiguous())
    assert_same(inputs.run("triton"), same.run("triton"), tolerance=0)


def test_only_the_inputs_and_log_sums_are_saved_for_backward():
    inputs = inputs_on_device(documents=5)
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attend(*arguments(leaves), **inputs.options)
    given = {x.data_ptr() for x in (*leaves.values(), inputs.options["document_ids"])}
    (log_sums,) = [x for x in saved if x.data_ptr() not in given]
    assert log_sums.dtype == torch.float32
    assert log_sums.shape == (1, 1, 2, 64)  # a number for each query and head, up to the end of a block


def through_checkpoint(use_reentrant, layers=1):
    """The attention, its output added to q and once more attended to for each further layer, under checkpointing."""

    def function(q, k, v, pre, post, **options):
        def inner(q, *tensors):
            weights = ComposeWeights(*tensors[2:8]), ComposeWeights(*tensors[8:])
            for _ in range(layers):
                q = attend(q, *tensors[:2], *weights, **options)
            return q

        return checkpoint(inner, q, k, v, *pre, *post, use_reentrant=use_reentrant)

    return function


@pytest.fixture
def taken(monkeypatch):
    """Weak references to what each backward pass was given of what forward has kept."""
    found = []
    original = op._take_recomputed

    def take(log_sums):
        kept = original(log_sums)
        found.append([weakref.ref(x) for of_chunk in kept for x in of_chunk])
        return kept

    monkeypatch.setattr(op, "_take_recomputed", take)
    return found


def results(inputs, function):
    """As with :meth:`AttentionInputs.run_function`, but through ``backward``, which reentrant checkpoints need."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    out = function(*arguments(leaves), **inputs.options)
    out.backward(inputs.cotangent)
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("scratch_bytes", [2**28, 2**10], ids=["kept", "too little scratch"])
def test_under_activation_checkpointing(taken, use_reentrant, scratch_bytes):
    """The recomputed forward pass keeps its maps where scratch allows. The bits are those without checkpointing."""
    inputs = inputs_on_device(window=7, scratch_bytes=scratch_bytes)
    expected = results(inputs, attend)
    del taken[:-1]  # on a GPU, those of the self-test
    assert taken == [[]]
    found = results(inputs, through_checkpoint(use_reentrant))
    assert len(taken) == 2
    assert bool(taken[1]) == (scratch_bytes == 2**28)
    assert_same(found, expected, tolerance=0)
    # Nothing survives the backward pass.
    assert not any(reference() is not None for reference in taken[1])
    assert not op._recomputed


def test_of_two_layers_in_a_checkpoint_the_last_one_keeps(taken):
    inputs = inputs_on_device()

    def two_layers(q, *rest, **options):
        return attend(attend(q, *rest, **options), *rest, **options)

    expected = results(inputs, two_layers)
    del taken[:]
    assert_same(results(inputs, through_checkpoint(use_reentrant=False, layers=2)), expected, tolerance=0)
    assert [bool(kept) for kept in taken] == [True, False]


def test_what_another_call_has_kept_is_not_taken(taken):
    """The recomputed forward pass runs both, backward only the first."""
    inputs = inputs_on_device()

    def function(q, k, v, pre, post):
        def inner(q):
            out = attend(q, k, v, pre, post)
            attend(2 * q, k, v, pre, post)
            return out

        return checkpoint(inner, q, use_reentrant=True)

    expected = results(inputs, attend)
    assert_same(results(inputs, function), expected, tolerance=0)
    assert not any(taken)


def test_torch_compile_sees_one_op():
    """aot_eager traces forward and backward as Inductor does, but runs the traced graphs without compiling them."""
    inputs = inputs_on_device(window=7, documents=8, absent=["pre.kg", "post.q1", "post.q2"])

    def function(*tensors, **options):
        return 2 * attend(*tensors, **options)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(inputs.run_function(compiled), inputs.run_function(function), tolerance=0)


@pytest.mark.parametrize("absent", [[], WEIGHTS[3:]])
def test_the_op_passes_opcheck(absent):
    """Schema, fake implementation, and autograd through the dispatcher."""
    inputs = inputs_on_device(queries=5, absent=absent)
    weights = [inputs.tensors.get(name) for name in WEIGHTS]
    tensors = [None if x is None else x.requires_grad_() for x in (*(inputs.tensors[n] for n in "qkv"), *weights)]
    torch.library.opcheck(torch.ops.dcscale.compose_triton.default, (*tensors, None, True, 3, 0.5, 0, 2**28))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_have_the_shapes_of_real_ones(dtype):
    call = inputs_on_device(dtype, queries=3, keys=70, window=5).call()
    flat = (call.q, call.k, call.v, *call.pre, *call.post, None, True, 5, 0.5, call.query_offset, 2**28)
    real = torch.ops.dcscale.compose_triton(*flat)
    gradients = torch.ops.dcscale.compose_triton_backward(call.q, real[1:], *flat)
    with FakeTensorMode() as mode:
        flat = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in flat]
        fake = torch.ops.dcscale.compose_triton(*flat)
        fake_gradients = torch.ops.dcscale.compose_triton_backward(flat[0], fake[1:], *flat)
    for found, expected in ((fake, real), (fake_gradients, gradients)):
        assert [(x.shape, x.dtype, x.stride()) for x in found] == [(x.shape, x.dtype, x.stride()) for x in expected]
