"""DCFormer as upstream trains it in JAX: Orbax checkpoints of MaxText with DCFormer's layers (Caiyun-AI/DCFormer,
jax/).

Orbax stores a tree of arrays in zarr, under their names in the tree joined by dots: each array in a folder of its own,
as upstream's code does (``use_ocdbt=False``), or all in one OCDBT database, Orbax's default. ``MaxTextFiles`` reads
them with tensorstore, one layer at a time; JAX and Orbax are not needed. Layers that were scanned over are one array
with an axis of layers, ``decoder.layers.X``; others have a number, ``decoder.layers_3.X``. Here both are called
``decoder.layers.3.X``.

The sizes of the model follow from the arrays' shapes. The rest (windows, epsilon, what is composed) is in the YAML
config of the run, such as upstream's ``configs/dcformer_pp_405m.yml``. Upstream's code fixes the base 10000 of RoPE,
tanh GELU in compose (flax's default), SiLU, and that a query sees ``window_size`` keys, including itself.

Upstream's layers come in groups of ``num_layers_per_block``, with one window for each layer of a group: layer l of
dcscale is number l % group of group l // group.

Letters: E model width, H heads, D head width, F hidden width, C = 4 branches, K = 4*H, R = 2 rank, G = 1 group of
heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.config import Config
from dcscale.config.schema import ModelConfig
from dcscale.config.yaml_syntax import parse, plain
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats.upstream import branch_numbers
from dcscale.convert.settings import check_known
from dcscale.convert.tensor_files import TensorFiles
from dcscale.convert.tensor_map import (
    DroppedTensor,
    Format,
    Imported,
    Plan,
    Source,
    TensorRule,
    checked_config,
    parameter_shapes,
)

OCDBT = "manifest.ocdbt"
_ITEMS = ("state", "default")
"""Names of the folder with the arrays inside the folder of a step."""

_MAX_LAYERS = 1000
_PARAMETERS = re.compile(r"params\.(?:params\.)?((?:token_embedder|decoder)\..+)")
_SCANNED, _NUMBERED = re.compile(r"decoder\.layers\.(.+)"), re.compile(r"decoder\.layers_(\d+)\.(.+)")


def find_state(path: Path) -> Path | None:
    """The folder with the arrays: ``path``, a folder inside it if it is a step, or that of the newest step if it is a
    run or its ``checkpoints``; None if there is none."""
    for folder in (path, *(path / item for item in _ITEMS)):
        if (folder / OCDBT).is_file() or next(folder.glob("params.*/.zarray"), None) is not None:
            return folder
    for folder in (path, path / "checkpoints"):
        steps = (step for step in folder.glob("*") if step.name.isdecimal() and step.is_dir())
        for step in sorted(steps, key=lambda step: int(step.name), reverse=True):
            if (state := find_state(step)) is not None:
                return state
    return None


class MaxTextFiles(TensorFiles):
    """Arrays of the tree ``params``. Others, such as the optimizer's, are not read; ``others`` lists their names.

    Args:
        state: from :func:`find_state`.
        scan_axis: the axis of layers in arrays of scanned layers (``param_scan_axis``).

    Raises:
        ConversionError: tensorstore is not installed, or a file is corrupt.
    """

    def __init__(self, state: Path, scan_axis: int):
        super().__init__(state)
        try:
            import tensorstore
        except ImportError as error:
            raise ConversionError(
                f"{state} is an Orbax checkpoint, which needs the tensorstore package: pip install tensorstore"
            ) from error
        self._library, self._scan_axis = tensorstore, scan_axis
        self._store: dict[str, Any] = {"driver": "file", "path": f"{state.resolve()}/"}
        if (state / OCDBT).is_file():
            self._store = {"driver": "ocdbt", "base": self._store}
        self._location: dict[str, tuple[str, int | None]] = {}
        """The array of every tensor, and its index on the axis of layers if the array has one."""
        self._open: dict[str, Any] = {}
        self.others: list[str] = []
        for array in self._arrays():
            if match := _PARAMETERS.fullmatch(array):
                self._add_array(array, match[1])
            else:
                self.others.append(array)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        array, layer = self._location[name]
        part = self._open[array]
        if layer is not None:
            # tensorstore slices lazily: only the chunks of this layer are read below.
            part = part[(slice(None),) * self._scan_axis + (layer,)]
        if rows is not None:
            part = part[rows[0] : rows[1]]
        try:
            values = part.read().result()
        except ValueError as error:
            raise ConversionError(f"{array} in {self.source} cannot be read: {_first_line(error)}") from error
        if self.dtypes[name] == torch.bfloat16:  # torch.from_numpy does not take the bfloat16 of ml_dtypes
            return torch.from_numpy(values.view("uint16").copy()).view(torch.bfloat16)
        return torch.from_numpy(values.copy())

    def _arrays(self) -> list[str]:
        """Names of all arrays."""
        store = self._library.KvStore.open(self._store).result()
        try:
            keys = [key.decode(errors="replace") for key in store.list().result()]
        except ValueError as error:
            raise ConversionError(f"{self.source} cannot be read: {_first_line(error)}") from error
        later = [key for key in keys if key.endswith("/zarr.json")]
        if later:
            raise ConversionError(f"{self.source} is in zarr's format 3 ({later[0]}): only format 2 can be read")
        return sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))

    def _add_array(self, array: str, name: str) -> None:
        """Registers the tensors in ``array``, whose name below params is ``name``: one, or one for each layer."""
        # By default a missing chunk is read as zeros.
        spec = {"driver": "zarr", "kvstore": {**self._store, "path": ""}, "fill_missing_data_reads": False}
        if self._store["driver"] == "ocdbt":
            spec["kvstore"]["path"] = f"{array}/"
        else:
            spec["kvstore"]["path"] = f"{self._store['path']}{array}/"
        try:
            opened = self._library.open(spec, read=True, open=True).result()
        except ValueError as error:
            raise ConversionError(f"{array} in {self.source} cannot be read: {_first_line(error)}") from error
        dtype = getattr(torch, opened.dtype.name, None)
        if not isinstance(dtype, torch.dtype):
            raise ConversionError(
                f"{array} in {self.source} has the type {opened.dtype.name}, which torch does not have"
            )
        shape = tuple(opened.shape)
        self._open[array] = opened
        if match := _NUMBERED.fullmatch(name):
            self._register(f"decoder.layers.{int(match[1])}.{match[2]}", shape, dtype, array, None)
        elif match := _SCANNED.fullmatch(name):
            axis = self._scan_axis
            if axis >= len(shape):
                raise ConversionError(
                    f"{array} in {self.source} has shape {list(shape)}, without the axis {axis} of scanned layers"
                )
            if shape[axis] > _MAX_LAYERS:
                raise ConversionError(
                    f"{array} in {self.source} has shape {list(shape)}, with more than {_MAX_LAYERS} layers on axis "
                    f"{axis}: is that param_scan_axis?"
                )
            for layer in range(shape[axis]):
                rest = (*shape[:axis], *shape[axis + 1 :])
                self._register(f"decoder.layers.{layer}.{match[1]}", rest, dtype, array, layer)
        else:
            self._register(name, shape, dtype, array, None)

    def _register(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, array: str, layer: int | None) -> None:
        self._add(name, shape, dtype)
        self._location[name] = array, layer


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


_KNOWN: dict[str, Any] = {
    "decoder_block": "dcformer",
    "normalization_layer_epsilon": None,
    "window_size": None,
    "num_layers_per_block": 1,
    "max_target_length": 2048,
    "mlp_activations": ["silu", "linear"],
    "pre_compose": None,
    "post_compose": None,
    "logits_via_embedding": False,
    "normalize_embedding_logits": True,
    "use_untrainable_positional_embedding": False,
    "num_experts": 1,
    "param_scan_axis": 1,
    "query_wise": True,
    "key_wise": True,
    "vocab_size": None,
    "head_dim": None,
    "base_emb_dim": None,
    "base_num_query_heads": None,
    "base_mlp_dim": None,
    "base_num_decoder_layers": None,
    "scan_layers": True,
    "global_parameter_scale": 1,
}
"""Settings that are read, with their defaults."""

_HARMLESS = {
    # The arrays show these.
    *("base_num_kv_heads", "qk_norm", "static_proj", "num_experts_per_tok", "fused_qkv", "fused_mlp"),
    # How the same function is computed: precision, chunks, kernels, recomputation.
    *("dtype", "weight_dtype", "logits_dot_in_fp32", "query_chunk_size", "attention", "use_iota_embed"),
    *("remat_policy", "record_internal_nn_metrics", "quantization_local_shard_count"),
    # Training: dropout, optimizer, schedule, initial weights, loss.
    *("dropout_rate", "enable_dropout", "opt_type", "adam_b1", "adam_b2", "adam_eps", "adam_eps_root"),
    *("adam_weight_decay", "gradient_clipping_threshold", "learning_rate", "cosine_learning_rate_final_fraction"),
    *("warmup_steps_fraction", "learning_rate_schedule_steps", "steps", "init_weights_seed", "zero_loss"),
    # Data, evaluation.
    *("dataset_path", "dataset_type", "dataset_name", "eval_dataset_name", "tokenizer_path"),
    *("max_corpus_chars", "grain_worker_count", "epoch", "iter_file_nums"),
    *("enable_data_shuffling", "data_shuffle_seed", "train_shuffle_buffer_size", "training_num_batches_to_skip"),
    *("reuse_example_batch", "per_device_batch_size", "eval_per_device_batch_size", "eval_shuffle_buffer_size"),
    *("eval_split", "eval_interval", "eval_loop_num_batches", "only_eval", "reset_for_eval", "target_eval_loss"),
    # Devices.
    *("hardware", "mesh_axes", "logical_axis_rules", "data_sharding", "num_slices", "jax_cache_dir"),
    *("compile_topology", "compile_topology_num_slices", "compiled_trainstep_file"),
    *(
        f"{link}_{kind}_parallelism"
        for link in ("dcn", "ici")
        for kind in ("data", "fsdp", "fsdp_transpose", "sequence", "tensor", "autoregressive")
    ),
    # Files, logs, profiles.
    *("run_name", "base_output_directory", "checkpoint_period", "enable_checkpointing", "async_checkpointing"),
    *("load_parameters_path", "load_parameters_from_path", "load_full_state_path", "load_full_state_from_path"),
    *("force_unroll", "save_config_to_gcs", "metrics_file", "gcs_metrics", "log_period", "enable_profiler"),
    *("upload_all_profiler_results", "skip_first_n_steps_for_profiler", "profiler_steps", "collect_stack_trace"),
    *("stack_trace_to_cloud", "stack_trace_interval_seconds"),
    # Sampling.
    *("prompt", "max_prefill_predict_length", "load_from_prefill_dir", "prefill_cache_dir"),
    *("autoregressive_decode_assert", "decode_sampling_strategy", "decode_sampling_nucleus_p"),
    *("decode_sampling_top_k", "decode_sampling_temperature"),
}
"""Other settings of upstream's YAML files, which do not change what the trained network computes."""

# Upstream's code replaces settings by those of a model_name other than default.
_OFF = {"model_name": "default", "quantization": "", "trainable_position_size": -1}

_REQUIRED = ("normalization_layer_epsilon", "window_size", "pre_compose", "post_compose")

# Upstream's names of dcscale's parameters; {} is the layer's number in its group.
_NAMES = {
    "embedding": "token_embedder.embedding",
    "norm": "decoder.decoder_norm.scale",
    "output": "decoder.logits_dense.kernel",
    "attention_norm": "pre_self_attention_layer_norm_{}.scale",
    "ffn_norm": "post_self_attention_layer_norm_{}.scale",
    "attention.q": "self_attention_{}.query.kernel",
    "attention.k": "self_attention_{}.key.kernel",
    "attention.v": "self_attention_{}.value.kernel",
    "attention.out": "self_attention_{}.out.kernel",
    "attention.q_norm": "self_attention_{}.q_norm.scale",
    "attention.k_norm": "self_attention_{}.k_norm.scale",
    "attention.compose.dw1": "self_attention_{}.AttentionOp_0.dyn_w_proj.dw1.kernel",
    "attention.compose.qkw": "self_attention_{}.AttentionOp_0.dyn_w_proj.qkw",
    "attention.compose.dd": "self_attention_{}.AttentionOp_0.dyn_w_proj.dd.kernel",
    "ffn.gate": "mlp_{}.wi_0.kernel",
    "ffn.up": "mlp_{}.wi_1.kernel",
    "ffn.down": "mlp_{}.wo.kernel",
}
_PARAMETER = re.compile(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.weight)?")
_BRANCHES = 4


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of ``_KNOWN`` in upstream's YAML file, checked.

    Raises:
        ConversionError: the file cannot be read, or describes a network that dcscale does not have.
    """
    try:
        content = plain(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # DialectError and UnicodeDecodeError are ValueErrors
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must be a mapping of upstream's settings, but is a {type(content).__name__}")
    check_known(content, _KNOWN, harmless=_HARMLESS, off=_OFF, file=str(path))
    s = {key: content.get(key, default) for key, default in _KNOWN.items()}
    problems = [f"{key} is missing" for key in _REQUIRED if key not in content]
    wanted = {
        "decoder_block": "dcformer",
        "mlp_activations": ["silu", "linear"],
        "num_experts": 1,
        "use_untrainable_positional_embedding": False,
    }
    problems += [
        f"{key} is {s[key]!r}, but only {value!r} is supported" for key, value in wanted.items() if s[key] != value
    ]
    if s["logits_via_embedding"] and s["normalize_embedding_logits"]:
        problems.append("logits_via_embedding with normalize_embedding_logits scales the logits: dcscale does not")
    for key in ("pre_compose", "post_compose", "logits_via_embedding"):
        if key in content and type(s[key]) is not bool:
            problems.append(f"{key} is {s[key]!r}, but must be true or false")
    for key in ("num_layers_per_block", "max_target_length"):
        if type(s[key]) is not int or s[key] < 1:
            problems.append(f"{key} is {s[key]!r}, but must be an integer of at least 1")
    if type(s["param_scan_axis"]) is not int or s["param_scan_axis"] < 0:
        problems.append(f"param_scan_axis is {s['param_scan_axis']!r}, but must be an integer of at least 0")
    # One window for each layer of a group; null is one global layer.
    windows = [None] if s["window_size"] is None else s["window_size"]
    if not isinstance(windows, list) or len(windows) != s["num_layers_per_block"]:
        problems.append(
            f"window_size is {windows!r}, but must list one window for each of num_layers_per_block = "
            f"{s['num_layers_per_block']} layers"
        )
    if problems:
        raise ConversionError(f"{path} cannot be used: " + "; ".join(problems))
    return {**s, "window_size": windows}


def read_model(files: MaxTextFiles, s: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The config of the model in ``files`` with the settings ``s``, and what the user should know.

    Raises:
        ConversionError: the arrays are not those of upstream's DCFormer, or do not match the settings.
    """
    group = s["num_layers_per_block"]
    embedding, query, hidden = (
        files.shapes.get(name)
        for name in (
            _NAMES["embedding"],
            "decoder.layers.0." + _NAMES["attention.q"].format(0),
            "decoder.layers.0." + _NAMES["ffn.gate"].format(0),
        )
    )
    if embedding is None or query is None or hidden is None or (len(embedding), len(query), len(hidden)) != (2, 3, 2):
        names = sorted({re.sub(r"\d+", "N", name) for name in files.shapes})
        raise ConversionError(
            f"{files.source} is not upstream's DCFormer: {_NAMES['embedding']} [V, E], "
            f"decoder.layers.0.self_attention_0.query.kernel [E, H, D] and decoder.layers.0.mlp_0.wi_0.kernel [E, F] "
            f"are required; it has {', '.join(names) or 'no parameters'}"
        )
    # Layers here are upstream's groups: each has all arrays of ``group`` layers.
    groups = len({name.split(".")[2] for name in files.shapes if name.startswith("decoder.layers.")})
    key = files.shapes.get("decoder.layers.0." + _NAMES["attention.k"].format(0), ())
    vocab_size, dim = embedding
    _, heads, head_dim = query
    _check_sizes(s, vocab_size, dim, heads, head_dim, hidden[1], groups * group)
    compose = s["pre_compose"] or s["post_compose"]
    model = {
        "attention": "dcmha" if compose else "mha",
        "vocab_size": vocab_size,
        "layers": groups * group,
        "dim": dim,
        "heads": heads,
        "kv_heads": key[1] if len(key) == 3 and key[1] != heads else None,
        "head_dim": None if head_dim * heads == dim else head_dim,
        "ffn_dim": hidden[1],
        "norm_eps": s["normalization_layer_epsilon"],
        "qk_norm": "decoder.layers.0." + _NAMES["attention.q_norm"].format(0) in files.shapes,
        "qk_norm_eps": s["normalization_layer_epsilon"],
        "windows": s["window_size"],
        "tied_embeddings": s["logits_via_embedding"],
        "compose": {"pre": s["pre_compose"], "post": s["post_compose"]} if compose else {},
    }
    notes = []
    if not compose:
        notes.append(
            "pre_compose and post_compose are false: a plain Transformer; its dyn_w_proj are dropped (upstream's "
            "dcformer_pp_2b8.yml has these values: set both to true if the run did compose)"
        )
    elif not (s["pre_compose"] and s["post_compose"]):
        off = "post" if s["pre_compose"] else "pre"
        notes.append(f"{off}_compose is false: its parts of dyn_w_proj are dropped")
    for side in ("query_wise", "key_wise"):
        if s[side] is not True:
            notes.append(f"{side} is {s[side]!r}, but upstream's code does not read it: compose has both sides")
    if files.others:
        notes.append(f"{len(files.others)} arrays that are not parameters (optimizer, step) are not read")
    return checked_config(model, s["max_target_length"], "upstream's config"), notes


def _check_sizes(
    s: Mapping[str, Any], vocab_size: int, dim: int, heads: int, head_dim: int, ffn_dim: int, layers: int
) -> None:
    """Raises ConversionError if the sizes of the config differ from the arrays': its windows would be wrong as well."""
    sizes = {"vocab_size": vocab_size, "head_dim": head_dim}
    if s["global_parameter_scale"] == 1:
        sizes |= {"base_emb_dim": dim, "base_num_query_heads": heads, "base_mlp_dim": ffn_dim}
        # If layers are not scanned, upstream's code takes base_num_decoder_layers as the number of groups.
        sizes |= {"base_num_decoder_layers": layers} if s["scan_layers"] else {}
    wrong = [
        f"{key} is {s[key]!r} in the config, {here} in the arrays"
        for key, here in sizes.items()
        if s[key] not in (None, here)
    ]
    if wrong:
        raise ConversionError("the YAML config is for another model: " + "; ".join(wrong))


def plan_maxtext(config: ModelConfig, group: int) -> Plan:
    """The plan that makes a model of ``config`` from upstream's arrays, whose layers come in groups of ``group``."""
    rules = []
    expected: dict[str, tuple[int, ...]] = {}
    e, h = config.dim, config.heads
    d = config.head_dim or e // h
    # Shapes of the kernels that are not simply transposed.
    kernels = {
        "attention.q": (e, h, d),
        "attention.k": (e, config.kv_heads or h, d),
        "attention.v": (e, config.kv_heads or h, d),
        "attention.out": (h, d, e),
        "attention.compose.dw1": (e, 1, _BRANCHES, 4 * h),
        "attention.compose.qkw": (1, _BRANCHES, 4 * h, 4, h),
        "attention.compose.dd": (e, 1, _BRANCHES * h),
    }
    branches = branch_numbers(config) if config.attention == "dcmha" else []
    makes = {
        "attention.out": ("[H, D, E], transposed", lambda kernel: kernel.flatten(0, 1).T),
        "attention.compose.dw1": ("[E, G, C, K]", lambda kernel: kernel[:, 0, branches]),
        "attention.compose.qkw": ("[G, C, K, 2R, H]", lambda kernel: kernel[0, branches]),
        "attention.compose.dd": (
            "[E, G, C*H]",
            lambda kernel: kernel[:, 0].unflatten(1, (_BRANCHES, -1))[:, branches].flatten(1),
        ),
    }
    for part in ("attention.q", "attention.k", "attention.v"):
        makes[part] = ("[E, H, D], transposed", lambda kernel: kernel.flatten(1).T)
    for part in ("ffn.gate", "ffn.up", "ffn.down", "output"):
        makes[part] = ("transposed", lambda kernel: kernel.T)
    for name, shape in parameter_shapes(config).items():
        layer, part = _PARAMETER.fullmatch(name).groups()
        source = _source(part, layer, group)
        how, make = makes.get(part, ("", None))
        expected[source] = kernels.get(part, shape[::-1] if how == "transposed" else shape)
        rules.append(TensorRule(name, (source,), how, make=make))
    dropped = {}
    for layer in range(config.layers):
        # Upstream's code creates dyn_w_proj even if the run does not compose.
        for part in ("dw1", "qkw", "dd"):
            source = _source(f"attention.compose.{part}", str(layer), group)
            if source not in expected:
                dropped[source] = DroppedTensor("pre_compose and post_compose are false")
                expected[source] = kernels[f"attention.compose.{part}"]
        for stage in ("pre", "post"):
            source = _source("attention.q", str(layer), group).replace("query.kernel", f"AttentionOp_0.{stage}_proj.w")
            # Its product is added to the scores, so zero does nothing.
            dropped[source] = DroppedTensor(
                "zero", ("is a static head projection, which dcscale does not have", _is_zero)
            )
            expected[source] = (1, h, h)
    return Plan(rules, expected, dropped)


def _source(part: str, layer: str | None, group: int) -> str:
    if layer is None:
        return _NAMES[part]
    number, index = divmod(int(layer), group)
    return f"decoder.layers.{number}.{_NAMES[part].format(index)}"


def _is_zero(tensor: Tensor) -> bool:
    return not torch.any(tensor)


def _detect(path: Path) -> Source | None:
    state = find_state(path)
    return None if state is None else Source("maxtext", state, f"MaxText checkpoint {state}")


def _load(source: Source, maxtext_config: Path | None = None) -> Imported:
    """See ``Format.load``. ``maxtext_config``: YAML config of the run; None looks for config.yml in its folders."""
    candidates = [folder / "config.yml" for folder in (source.folder, *source.folder.parents[:3])]
    config = maxtext_config or next((path for path in candidates if path.is_file()), None)
    if config is None:
        raise ConversionError(
            f"{source.description} does not state its windows: name the YAML config of its run, such as upstream's "
            f"dcformer_pp_405m.yml, with --maxtext-config (looked for {', '.join(map(str, candidates))})"
        )
    settings = read_settings(config)
    files = MaxTextFiles(source.folder, settings["param_scan_axis"])
    model, notes = read_model(files, settings)
    plan = plan_maxtext(model.model, settings["num_layers_per_block"])
    return Imported(files, model, plan, [f"settings are from {config}", *notes])


FORMAT = Format(
    name="maxtext",
    looks_for=f"params.*/.zarray or {OCDBT} (MaxText)",
    detect=_detect,
    load=_load,
    options=("maxtext_config",),
)
