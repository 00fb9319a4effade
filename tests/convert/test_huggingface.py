"""dcscale -> Hugging Face -> dcscale: the exported model computes the same as dcscale's in every way of calling it."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dcscale.checkpoint.layout import read_config, read_state
from dcscale.config.schema import ComposeConfig, RopeScalingConfig
from dcscale.convert import convert
from dcscale.models import generate
from dcscale.testing.models import random_ids, random_model, tensors_of, tiny_config, write_checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_modules")

PYTHIA = {"norm": "layernorm", "norm_eps": 1e-5, "ffn": "gelu", "bias": True}
MODELS = {
    "dcformer": {},
    "multi_gate": {"multi_gate": 6, "qk_norm": False, "rope_base": 5e5},
    "erf rank 1": {"compose": ComposeConfig(gelu="erf", rank=1, gate_init=0.05)},
    "grouped": {"kv_heads": 2, "head_dim": 6, "qk_norm_eps": 1e-5, "windows": [1, 3, None], "layers": 4},
    "twin tied": {"attention": "mha", "tied_embeddings": True, "windows": [None]},
    "query-wise": {"compose": ComposeConfig(key_wise=False)},
    "key-wise pre gates": {"compose": ComposeConfig(query_wise=False, post=False, low_rank=False)},
    "post low-rank": {"compose": ComposeConfig(pre=False, gates=False), "tied_embeddings": True},
    "qwen2": {"qkv_bias": True, "rope_scaling": RopeScalingConfig("linear", factor=3.0)},
    "llama3": {"rope_scaling": RopeScalingConfig("llama3", 8.0, original_length=12), "head_dim": 32},
    "pythia": {"parallel_residual": True, "rope_fraction": 0.25, "windows": [6, None], **PYTHIA},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Checkpoints and Hugging Face folders by the name of their model, each made once."""
    root, made = tmp_path_factory.mktemp("huggingface"), {}

    def make(name, **changes):
        if name not in made:
            config = tiny_config(**MODELS[name], **changes)
            source = write_checkpoint(root / f"{len(made)}" / "model", config, shard_bytes=1 << 14)
            convert(source, source.with_name("exported"), "huggingface")
            made[name] = config, source, source.with_name("exported")
        return made[name]

    return make


def load(folder, dtype=torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def reference_of(config, dtype=torch.float64):
    return random_model(config, dtype=torch.float32).to(dtype)


def module_of(model):
    return sys.modules[type(model).__module__]


def past(output):
    return output.cache if "cache" in output else output.past_key_values


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_steps_equal_dcscales(name, exported, monkeypatch):
    config, _, folder = exported(name)
    model = load(folder)
    ids = random_ids(config, 2, 19)
    with torch.no_grad():
        expected = reference_of(config)(ids)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)
        monkeypatch.setattr(module_of(model), "SCRATCH_ELEMENTS", 2 * 4 * 19 * 5)  # chunks of 5 queries
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-9)
        cache, parts = None, []
        for part in ids.split([7, 1, 1, 6, 1, 3], dim=1):
            output = model(part, past_key_values=cache)
            cache = past(output)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)
    for layer in cache.layers:
        kept = 19 if layer.window is None else layer.window - 1
        assert {x.shape[1] for x in layer.tensors.values()} == {kept}
    assert cache.get_seq_length() == 19


@pytest.mark.parametrize("name", MODELS)
def test_converting_back_is_bit_equal_also_after_transformers_saved_it(name, exported, tmp_path):
    config, source, folder = exported(name)
    model = load(folder, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    ids = random_ids(config, 1, 9)
    with torch.no_grad():
        again = load(tmp_path / "saved", torch.float32)(ids).logits
        assert torch.equal(again, model(ids).logits)
        assert (again - reference_of(config, torch.float32)(ids)).abs().max() <= 1e-4
    for number, given in enumerate((folder, tmp_path / "saved")):
        back = tmp_path / f"back{number}"
        done = convert(given, back, "dcscale")
        assert done.source.description == f"Hugging Face folder of a dcscale model {given}"
        before, after = tensors_of(source), tensors_of(back)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert read_config(back).model == replace(
            config, kv_heads=config.kv_heads or config.heads, head_dim=config.head_dim or config.dim // config.heads
        )
        assert read_config(back).data.sequence_length == read_config(source).data.sequence_length
        assert read_state(back)["tokenizer"] == {"spec": "byte", "eos_id": 256}
        assert not (back / "tokenizer.json").exists()


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [[5, 7, 9, 11, 2, 3, 4, 1, 8], [3], [6, 6, 1, 50]]


@pytest.mark.parametrize("name", ["dcformer", "grouped", "pythia", "twin tied"])
def test_generate_chooses_the_same_tokens_as_dcscale(name, exported):
    config, _, folder = exported(name)
    model = load(folder)
    expected = generate(reference_of(config), PROMPTS, 12, temperature=0, top_p=1, seed=0)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for use_cache in (True, False):
        written = model.generate(**padded(PROMPTS), use_cache=use_cache, **options)
        assert written[:, 9:].tolist() == expected
    alone = model.generate(torch.tensor([PROMPTS[2]]), **options)
    assert alone[0, 4:].tolist() == expected[2]


def test_beams_and_samples_are_those_without_a_cache(exported):
    _, _, folder = exported("dcformer")
    model = load(folder)
    common = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    for options in ({"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 0, "temperature": 1.3}):
        written = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            written.append(model.generate(**padded(PROMPTS), use_cache=use_cache, **common, **options))
        assert torch.equal(*written)
        assert len(written[0]) == 3 * options.get("num_return_sequences", 1)
    hidden = model.generate(
        **padded(PROMPTS), **common, return_dict_in_generate=True, output_hidden_states=True, output_logits=True
    )
    assert len(hidden.logits) == 10
    assert hidden.hidden_states[0][2].shape == (3, 9, 32)


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_a_chat_continues_from_the_cache_of_its_last_turn(exported):
    config, _, folder = exported("grouped")  # also layers with windows
    model, first = load(folder), padded(PROMPTS)
    turn = model.generate(**first, return_dict_in_generate=True, **GREEDY)
    assert past(turn).get_seq_length() == 9 + 5  # the last token is not read yet
    ids = torch.cat([turn.sequences, random_ids(config, 3, 4)], dim=1)
    whole = {"input_ids": ids, "attention_mask": F.pad(first["attention_mask"], (0, 10), value=1)}
    expected = model.generate(**whole, **GREEDY)
    only_new = {**whole, "input_ids": ids[:, 14:]}
    for inputs in (whole, {**whole, "prefill_chunk_size": 2}, only_new):
        written = model.generate(**inputs, past_key_values=copy.deepcopy(past(turn)), **GREEDY)
        assert torch.equal(written[:, -6:], expected[:, -6:])
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": whole["attention_mask"]}
    written = model.generate(**embedded, past_key_values=copy.deepcopy(past(turn)), **GREEDY)
    assert torch.equal(written, expected[:, -6:])


def test_rows_can_share_the_cache_of_their_beginning(exported):
    config, _, folder = exported("dcformer")
    model, ids = load(folder), random_ids(config, 1, 9).clamp(min=1)  # generate() takes 0 for padding
    cache = past(model(ids[:, :5]))
    with pytest.raises(ValueError, match=r"the cache holds 1 rows, but the input has 3: repeat .*batch_repeat_interl"):
        model(ids[:, 5:].expand(3, -1), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_the_prompt_can_be_read_in_chunks(chunk, exported):
    model = load(exported("dcformer")[2])
    expected = model.generate(**padded(PROMPTS), **GREEDY)
    assert torch.equal(model.generate(**padded(PROMPTS), prefill_chunk_size=chunk, **GREEDY), expected)


@pytest.mark.parametrize("tokens", [9, 1])
def test_generate_takes_embeddings(tokens, exported):
    model, inputs = load(exported("dcformer")[2]), padded(PROMPTS)
    inputs = {name: x[:, -tokens:] for name, x in inputs.items()}
    expected = model.generate(**inputs, **GREEDY)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    written = model.generate(inputs_embeds=embeddings, **inputs, **GREEDY)
    assert torch.equal(written, expected[:, tokens:])


def test_hidden_states_are_those_of_transformers(exported):
    """As in transformers' own models: the embeddings, every block but the last, and the output of the final norm."""
    config, _, folder = exported("dcformer")
    model, ids = load(folder), random_ids(config, 2, 9)
    model.config.output_hidden_states = True
    output = model(ids, logits_to_keep=1)
    states = output.hidden_states
    assert [state.shape for state in states] == [(2, 9, 32)] * 3
    assert torch.equal(states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.output(states[-1][:, -1:]), output.logits)
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_the_config_has_numbers_where_null_is_a_default(exported):
    _, _, folder = exported("dcformer")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert type(config)(hidden_size=32, num_attention_heads=2).head_dim == 16
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["kv_heads"], settings["head_dim"]) == (4, 8)


def test_padding_on_either_side_changes_nothing(exported):
    config, _, folder = exported("dcformer")
    model = load(folder)
    ids = random_ids(config, 1, 9)
    with torch.no_grad():
        expected = model(ids).logits
        for left, right in ((4, 0), (0, 4), (2, 3)):
            mask = F.pad(torch.ones(1, 9), (left, right))
            logits = model(F.pad(ids, (left, right), value=7), attention_mask=mask).logits
            torch.testing.assert_close(logits[:, left : left + 9], expected, rtol=0, atol=1e-9)
        embeddings = model.get_input_embeddings()(ids)
        last = model(inputs_embeds=embeddings, position_ids=torch.arange(9)[None] + 100, logits_to_keep=2).logits
    # Only differences of positions matter to RoPE; its table is float32.
    torch.testing.assert_close(last, expected[:, -2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_dcscales(recompute, exported, monkeypatch):
    config, _, folder = exported("grouped")
    model, reference = load(folder).train(), reference_of(config)
    monkeypatch.setattr(module_of(model), "SCRATCH_ELEMENTS", 2 * 4 * 12 * 5)
    if recompute:
        model.gradient_checkpointing_enable()
    ids = random_ids(config, 2, 12)
    labels = ids.clone()
    labels[0, 3:6] = -100
    loss = model(ids, labels=labels).loss
    loss.backward()
    expected = reference(ids, F.pad(labels[:, 1:], (0, 1), value=-100)) / (labels[:, 1:] != -100).sum()
    expected.backward()
    # transformers computes the loss in float32.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    parameters = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    by_hand = model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(by_hand * 10, loss * (labels[:, 1:] != -100).sum(), rtol=1e-5, atol=0)


def test_bfloat16_rounds_where_dcscale_does(exported):
    config, _, folder = exported("dcformer")
    ids = random_ids(config, 2, 19)
    with torch.no_grad():
        expected = reference_of(config, torch.bfloat16)(ids)
        logits = load(folder, torch.bfloat16)(ids).logits
        exact = reference_of(config)(ids).float()
    assert logits.dtype == torch.float32
    error, allowed = (logits - exact).norm(), (expected - exact).norm()
    assert error <= 1.2 * allowed, (error, allowed)
    assert (logits - expected).norm() <= allowed


def test_initial_weights_are_distributed_as_in_dcscale(exported):
    _, _, folder = exported("dcformer")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    spread = {name: float(parameter.detach().std()) for name, parameter in model.named_parameters()}
    assert spread["blocks.0.attention.q.weight"] == pytest.approx(0.05, rel=0.1)
    assert spread["blocks.0.attention.compose.dw1"] == pytest.approx((2 / (32 + 16)) ** 0.5, rel=0.1)
    assert spread["blocks.0.attention.compose.qkw"] == pytest.approx(0.02 / (4 * 6), rel=0.1)
    assert spread["blocks.1.attention.compose.dd"] == pytest.approx(0.005 * (2 / 36) ** 0.5, rel=0.2)
    assert spread["blocks.1.ffn_norm.weight"] == 0


def test_invalid_calls_raise(exported):
    config, _, folder = exported("dcformer")
    model = load(folder)
    ids = random_ids(config, 1, 5)
    other = transformers.DynamicCache()
    cases = [
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"past_key_values": other}, "the cache is a DynamicCache, without compose weights"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask is \[1, 4\], but must be \[1, 5\]"),
        ({"output_attentions": True}, "output_attentions is set, but attention is computed in chunks"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, **changes})
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_generate_refuses_what_it_cannot_do(exported):
    config, _, folder = exported("dcformer")
    model, ids = load(folder), random_ids(config, 1, 5)
    for kind in ("static", "offloaded", "quantized", "offloaded_static", "sliding_window"):
        with pytest.raises(ValueError, match=f"cache_implementation is '{kind}', but only the model's own cache"):
            model.generate(ids, cache_implementation=kind, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **GREEDY), model.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match=r"continuous batching \(cache_implementation 'paged', generate_batch\)"):
        model.generate(ids, cache_implementation="paged", **GREEDY)
    cache = past(model(ids))
    for given in (ids, ids[:, :2]):
        with pytest.raises(ValueError, match=r"the cache holds 5 tokens already, so that no new one is left to read"):
            model.generate(given, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="prefill_chunk_size is set, but inputs_embeds are not read in chunks"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), prefill_chunk_size=2, **GREEDY)


def test_a_cache_and_gradient_checkpointing(exported):
    config, _, folder = exported("dcformer")
    model, ids = load(folder), random_ids(config, 1, 5)
    cache, expected = past(model(ids)), model.generate(ids, **GREEDY)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="a cache is given, but gradient checkpointing recomputes blocks without one"):
        model(ids, past_key_values=cache)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_padding_is_kept_when_the_model_is_exported_by_torch(exported):
    config, _, folder = exported("dcformer")
    model, ids, mask = load(folder), random_ids(config, 2, 9), torch.ones(2, 9, dtype=torch.long)
    program = torch.export.export(model, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    mask[0, :3] = 0
    logits = program.module()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits)
