"""What a wrong key, value or file name may have meant: similar names, and the names of other trainers."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from dcscale.config.errors import did_you_mean, show
from dcscale.config.reference import FIELDS, SECTIONS, Field, has_type

PATHS = [*SECTIONS, *FIELDS]
"""Every section and setting."""

_FOREIGN_NAMES = {
    "model.dim": "hidden_size d_model n_embd embed_dim emb_dim",
    "model.layers": "num_layers n_layers n_layer num_hidden_layers depth",
    "model.heads": "num_heads n_heads n_head num_attention_heads",
    "model.kv_heads": "num_key_value_heads n_kv_heads num_query_groups",
    "model.ffn_dim": "intermediate_size ffn_hidden_size d_ff mlp_dim hidden_dim",
    "model.windows": "sliding_window window_size",
    "model.rope_base": "rope_theta rotary_base",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.tied_embeddings": "tie_word_embeddings weight_tying",
    "data.sequence_length": "seq_len seq_length max_seq_len block_size context_length max_position_embeddings",
    "data.train": "train_data data_path dataset",
    "data.validation": "valid_data eval_data",
    "data.workers": "num_workers",
    "train.steps": "max_steps num_steps total_steps max_iters train_iters",
    "train.global_batch_size": "total_batch_size train_batch_size",
    "train.micro_batch_size": "per_device_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu",
    "train.precision": "dtype torch_dtype mixed_precision bf16 fp16 fp32",
    "train.gradient_clipping": "grad_clip clip_grad max_grad_norm gradient_clip_val",
    "train.recompute": "gradient_checkpointing activation_checkpointing checkpoint_activations",
    "optimizer.learning_rate": "lr max_lr peak_lr",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "epsilon adam_eps adam_epsilon",
    "schedule.kind": "lr_scheduler lr_scheduler_type lr_decay_style",
    "schedule.warmup_steps": "warmup warmup_iters warmup_ratio lr_warmup_iters num_warmup_steps",
    "schedule.decay_steps": "lr_decay_steps lr_decay_iters decay_iters",
    "schedule.final_ratio": "min_lr lr_min final_lr",
    "parallel.zero_stage": "stage zero_optimization deepspeed_stage",
    "validation.interval": "eval_interval eval_steps eval_every",
    "checkpoint.interval": "save_interval save_steps save_every",
    "checkpoint.resume": "resume_from_checkpoint load load_path",
    "checkpoint.init_from": "pretrained model_name_or_path init_checkpoint",
    "log.interval": "log_interval logging_steps log_every",
    "run.folder": "output_dir out_dir save_dir",
}
_SETTING_OF = {name: path for path, names in _FOREIGN_NAMES.items() for name in names.split()}
_NOTES = {
    "batch_size": "did you mean train.global_batch_size (sequences per optimizer step, over all ranks) or "
    "train.micro_batch_size (at most, per rank in one pass)?",
    "gradient_accumulation_steps": "it follows from train.global_batch_size, train.micro_batch_size and the ranks",
    "dropout": "dcscale has no dropout",
    "epochs": "the length of a run is train.steps; tools/check_config.py prints how many epochs that is",
    "tokenizer": "the tokenizer is that of the shards, see tools/make_shards.py --tokenizer",
}
_NOTES |= {"accumulation_steps": _NOTES["gradient_accumulation_steps"], "num_train_epochs": _NOTES["epochs"]}
_NOTES |= dict.fromkeys(("hidden_dropout", "attention_dropout", "resid_pdrop"), _NOTES["dropout"])

_FOREIGN_VALUES = {
    "train.precision": {
        **dict.fromkeys(
            ("fp16", "float16", "half", "16", "16-mixed"), "float16 is not supported: it needs loss scaling, use bf16"
        ),
        **dict.fromkeys(("bfloat16", "bf16-mixed"), "did you mean bf16?"),
        **dict.fromkeys(("float32", "32", "tf32"), "did you mean fp32?"),
    },
}


def names_in(prefix: str) -> list[str]:
    """Names of the keys and sections directly in a section, in alphabetical order."""
    return sorted(path[len(prefix) :] for path in PATHS if path.startswith(prefix) and "." not in path[len(prefix) :])


def key_suggestion(path: str) -> str:
    """What an unknown path may have meant: the same name in another section, a name of another trainer, or a similar
    one; else the known names."""
    above = [".".join(path.split(".")[:n]) for n in range(path.count("."), 0, -1)]
    if field := next((FIELDS[p] for p in above if p in FIELDS), None):
        return f"{field.path} has no keys: set it itself, such as {field.path}={show(field.default)}"
    prefix = next((f"{p}." for p in above if p in SECTIONS), "")
    siblings = names_in(prefix)
    by_name: dict[str, list[str]] = {}
    for known in PATHS:
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    name = path.rpartition(".")[2]
    foreign = name.lower().replace("-", "_")
    if foreign in _NOTES:
        return _NOTES[foreign]
    if name in by_name:
        found = by_name[name]
    elif foreign in _SETTING_OF:
        found = [_SETTING_OF[foreign]]
    elif close := difflib.get_close_matches(name, siblings, n=1):
        found = [prefix + close[0]]
    elif close := difflib.get_close_matches(name, by_name, n=1, cutoff=0.7):
        found = by_name[close[0]]
    elif not prefix and (close := difflib.get_close_matches(path, PATHS, n=1, cutoff=0.7)):
        found = close
    else:
        return f"the keys {f'of {prefix[:-1]}' if prefix else 'at the top'} are {', '.join(siblings)}"
    return f"did you mean {' or '.join(found)}?"


def type_suggestion(field: Field, value: Any) -> str:
    """The way out for a value that does not have the type of its field."""
    items = value if isinstance(value, list) else [value]
    if "None" in items:
        nulled = [None if item == "None" else item for item in items]
        if has_type(nulled if items is value else None, field.type):
            return f"write {show(nulled if items is value else None)}"
    if field.type is bool:
        return "write true or false"
    if field.type in (int, int | None) and isinstance(value, float):
        if value.is_integer():
            return f"write {int(value)}"
        if 0 < value < 1 and field.path.endswith("steps"):
            return "it counts optimizer steps, not a fraction of train.steps"
    return f"the default is {show(field.default)}"


def choice_suggestion(field: Field, value: Any) -> str:
    """The way out for a value that is not one of the choices of its field."""
    if note := _FOREIGN_VALUES.get(field.path, {}).get(str(value).lower()):
        return note
    return did_you_mean(str(value), map(str, field.choices or ())) or f"the default is {show(field.default)}"


def file_suggestion(path: Path) -> str:
    """A file with a similar name, from the same folder or from the folder ``configs``."""
    files = {file.name: file for file in (*Path("configs").rglob("*.y*ml"), *path.parent.glob("*.y*ml"))}
    near = difflib.get_close_matches(path.name, files, n=1)
    found = f"did you mean {files[near[0]]}?" if near else "the presets are in the folder configs"
    key, equals, _ = str(path).partition("=")
    if equals:
        return f"{found}{'' if near else '.'} As a setting, {key} is unknown: {key_suggestion(key)}"
    return found if path.suffix in (".yaml", ".yml") or near else f"{found}, and settings are written key=value"
