"""Keys of another library's config that a conversion may drop.

A key that nobody here knows may change what the network computes, now or in a later version of that library. So it is
refused by name and value, unless it is listed below or its value switches off whatever it stands for.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from dcscale.convert.errors import ConversionError

HARMLESS = frozenset(
    {
        # What wrote the file, and for which classes; auto_map names code that is not run here.
        *("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "name_or_path"),
        *("_commit_hash", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
        # Precision is that of the tensors; which implementation computes attention does not change its result.
        *("torch_dtype", "dtype", "use_bfloat16", "attn_implementation", "_attn_implementation"),
        *("_attn_implementation_autoset", "_attn_implementation_internal", "_experts_implementation_internal"),
        *("pretraining_tp", "chunk_size_feed_forward", "torchscript"),
        # Training: initial weights, dropout and losses. convert/formats/ prints a note on dropout.
        *("initializer_range", "gradient_checkpointing", "classifier_dropout", "tf_legacy_loss"),
        # Ids of tokens, read for the tokenizer, and names of tokenizers and lengths of their texts.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("tokenizer_class", "prefix", "max_sequence_length", "model_max_length"),
        # What a call returns.
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "tie_last_hidden_states"),
        # Heads of classifiers, which a language model does not have.
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        "is_decoder",  # only read for a warning
        # Sampling, which version 4 of transformers wrote into config.json.
        *("do_sample", "early_stopping", "max_length", "min_length", "num_beams", "num_beam_groups", "temperature"),
        *("top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty"),
        *("diversity_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
        *("exponential_decay_length_penalty", "remove_invalid_values", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "max_new_tokens"),
    }
)
"""Keys of config.json that do not change the logits of a causal language model, whatever their value."""

OFF: Mapping[str, Any] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "attention_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "use_qk_norm": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "logit_scale": 1,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
}
"""Values with which a key of config.json does nothing. Null does nothing either, except for ``is_causal``."""


def check_known(
    settings: Mapping[str, Any],
    known: Collection[str],
    *,
    harmless: Collection[str] = HARMLESS,
    off: Mapping[str, Any] = OFF,
    file: str = "config.json",
) -> None:
    """Checks that every key of a config is read, or may be dropped.

    Args:
        known: keys that are read.
        harmless: keys that may be dropped.
        off: keys that may be dropped if they have this value.
        file: the config's name, for the error message.

    Raises:
        ConversionError: names all other keys with their values.
    """
    unknown = []
    for key, value in settings.items():
        if key in known or key in harmless or (key in off and value == off[key]):
            continue
        # transformers takes is_causal=None as false.
        if value is not None or key == "is_causal":
            unknown.append(f"{key}={reprlib.repr(value)}")
    if unknown:
        raise ConversionError(
            f"its config has settings that may change the network, and that dcscale does not know: "
            f"{', '.join(unknown)}; remove from {file} those that do not change it"
        )
