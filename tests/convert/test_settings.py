"""Settings of another library's config: what may change the network is refused by name and value."""

import pytest
import torch
import transformers

from dcscale.convert import ConversionError
from dcscale.convert.formats import transformers as plain
from dcscale.convert.settings import OFF, check_known

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", **SIZES}
UNKNOWN = [
    *({"is_causal": value} for value in (False, None, 0)),
    *({key: {"a": 1} if value == {} else not value if type(value) is bool else 2} for key, value in OFF.items()),
    *({"new_switch": value} for value in (True, False, 0, "", [], {"deep": [[[1]]]})),
    *({"sliding_window": 5}, {"layer_types": 3 * ["sliding_attention"]}, {"attention_chunk_size": 4}),
    *({"final_logit_softcapping": 30.0}, {"quantization": {"bits": 4}}, {"transformers_weights": "other.safetensors"}),
]


@pytest.mark.parametrize("setting", UNKNOWN, ids=str)
def test_unknown_settings_are_refused_by_name_and_value(setting):
    ((key, value),) = setting.items()
    with pytest.raises(ConversionError, match="dcscale does not know: .*; remove from a.json those that") as error:
        check_known({**SIZES, **setting, "temperature": 0.7}, SIZES, file="a.json")
    assert f" {key}={value!r};" in str(error.value)


def test_all_unknown_settings_are_named_with_short_values():
    with pytest.raises(
        ConversionError, match="does not know: a=1, b=\\[0, 1, 2, 3, 4, 5, ...\\], c='x+\\.\\.\\.x+'; rem"
    ):
        check_known({"a": 1, "b": list(range(10**5)), "c": 10**6 * "x"}, ())


def test_settings_that_are_off_or_do_not_matter_are_dropped():
    settings = {**OFF, "sliding_window": None, "final_logit_softcapping": None, "temperature": 0.7, "top_p": None}
    settings |= {"transformers_version": "4.40.0", "torch_dtype": "float16", "use_cache": False, "pretraining_tp": 2}
    read = plain.read_config({**LLAMA, **settings}, tied=False)
    assert read == plain.read_config(LLAMA, tied=False)


COMMON = {"architectures": ["A"], "torch_dtype": "bfloat16", "transformers_version": "4.45.2", "use_cache": True}
COMMON |= {"bos_token_id": 1, "eos_token_id": [2, 3], "initializer_range": 0.02, "rope_scaling": None}
RELEASED = {
    "Llama-3.1-8B": ("llama", {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 5e5}),
    "SmolLM2-135M-Instruct": (
        "llama",
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "pad_token_id": 2,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
    ),
    "unsloth": ("llama", {"unsloth_fixed": True, "unsloth_version": "2025.3", "head_dim": 8}),
    "vicuna-7b": ("llama", {"max_sequence_length": 2048, "do_sample": True, "temperature": 0.9, "max_length": 4096}),
    "Qwen2.5-0.5B": ("qwen2", {"use_mrope": False, "use_sliding_window": False, "sliding_window": 32768}),
    "Qwen3-0.6B": ("qwen3", {"attention_bias": False, "max_window_layers": 28, "sliding_window": None, "head_dim": 8}),
    "Mistral-7B-v0.1": ("mistral", {"sliding_window": 4096, "num_key_value_heads": 2}),
    "pythia-160m": (
        "gpt_neox",
        {
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "classifier_dropout": 0.1,
            "attention_bias": True,
            "hidden_act": "gelu",
            "hidden_dropout": 0.0,
            "layer_norm_eps": 1e-5,
        },
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_keys_of_released_models_are_known(name):
    family, settings = RELEASED[name]
    plain.read_config({"model_type": family, **SIZES, **COMMON, **settings}, tied=False)


@torch.no_grad()
def test_what_transformers_does_with_these_settings():
    """The reason for the list: ``is_causal`` is in no config class, and yet changes the network."""

    def logits(**settings):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, **settings)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
        return model(torch.arange(12)[None]).logits

    off = {key: value for key, value in OFF.items() if key not in ("per_layer_config", "pruned_heads")}
    assert torch.equal(logits(**off), logits())
    for value in (False, None):
        assert not torch.allclose(logits(is_causal=value), logits(), atol=1e-3)
