"""From a folder to a folder: what the source is, what becomes of each tensor, and the writing of it.

Only one tensor and one shard of the result are in memory at any time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dcscale.checkpoint import CheckpointError, save_weights
from dcscale.checkpoint.layout import CONFIG, STATE, STATE_FORMAT, WEIGHTS, read_config, read_state, seal
from dcscale.checkpoint.probe import check_model
from dcscale.checkpoint.weights import SHARD_BYTES
from dcscale.config import Config, to_yaml
from dcscale.config.schema import ModelConfig
from dcscale.convert.detect import Source, detect
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import huggingface, maxtext, transformers, upstream, upstream_config
from dcscale.convert.formats.huggingface import TOKENIZER
from dcscale.convert.formats.maxtext import MaxTextFiles
from dcscale.convert.output import check_target, new_folder
from dcscale.convert.tensor_files import TensorFiles, open_tensors
from dcscale.convert.tensor_map import Plan, TensorRule, check_dropped, check_names, non_finite, table
from dcscale.files import write_atomically, write_json
from dcscale.models import DCFormer

FORMATS = ("dcscale", "upstream", "huggingface")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Conversion:
    """A conversion whose names, shapes and settings fit; no tensor has been read but to find out which are trained."""

    found: Source
    files: TensorFiles
    target: str
    config: Config
    plan: Plan
    dtype: torch.dtype | None
    state: dict[str, Any]
    """Content of a model folder's state.json."""
    settings: dict[str, Any] | None
    """Content of config.json, where the target has one."""
    notes: list[str]
    beside: dict[str, str] = field(default_factory=dict)
    """Texts of other files of the result, by name."""

    def lines(self) -> list[str]:
        """What a person should know, and the mapping."""
        shared = [f"shared in the file, written one by one: {', '.join(names)}" for names in self.files.shared]
        return [*(f"note: {note}" for note in [*self.notes, *shared]), *table(self.plan, self.files)]

    def write(self, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the result. Raises ConversionError for values that are not finite or may not be left out."""
        check_dropped(self.plan, self.files)
        problems: list[str] = []
        with new_folder(target) as folder:
            at = folder / WEIGHTS if self.target == "dcscale" else folder
            try:
                save_weights(self._tensors(problems), at, shard_bytes)
            except SafetensorError as error:  # what a full disk ends in
                raise ConversionError(f"{target} cannot be written: {error}") from error
            self._refuse(problems)
            byte_tokens = (self.state.get("tokenizer") or {}).get("spec") == "byte"
            if (self.found.folder / TOKENIZER).is_file() and not byte_tokens:
                shutil.copyfile(self.found.folder / TOKENIZER, folder / TOKENIZER)
            for name, content in self.beside.items():
                write_atomically(folder / name, content)
            if self.settings is not None:
                write_json(folder / "config.json", self.settings)
            else:
                write_json(folder / STATE, self.state)
                # Of a model that others trained, only the model is known: the rest is for a run to say.
                known = None if self.found.kind == "dcscale" else ("model", "data.sequence_length", "train.precision")
                write_atomically(folder / CONFIG, to_yaml(self.config, known))
                seal(folder)

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> DCFormer:
        """The result as a model in eval mode on ``device``, without a folder; ``dcscale`` must be the target.

        Needs the memory of the model and of one tensor. ``dtype`` None is the type it was trained in.

        Raises:
            ConversionError: there are values that are not finite or may not be left out, or the model computes
                something else than its checkpoint's probe says.
        """
        check_dropped(self.plan, self.files)
        with torch.device("meta"):
            model = DCFormer(self.config.model)
        model = model.to(dtype or DTYPES[self.config.train.precision]).to_empty(device=device)
        if self.config.model.tied_embeddings:
            model.output.weight = model.embedding.weight  # to_empty has given each a memory of its own
        model = model.eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        problems: list[str] = []
        for name, tensor in self._tensors(problems):
            parameters[name].copy_(tensor)
        self._refuse(problems)
        if self.found.kind == "dcscale":
            try:
                check_model(model, self.found.folder, next(model.parameters()).dtype, device)
            except CheckpointError as error:
                raise ConversionError(str(error)) from error
        return model

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise ConversionError("\n".join([f"{self.files.source} has values that are not finite:", *problems]))

    def _tensors(self, problems: list[str]) -> Iterator[tuple[str, Tensor]]:
        for recipe in self.plan.recipes:
            tensor = recipe.apply(self.files.read)
            if self.dtype is not None:
                tensor = tensor.to(self.dtype)
            if (problem := non_finite(tensor)) is not None:
                problems.append(f"  - {recipe.name}  <-  {', '.join(recipe.sources)}: {problem}")
            yield recipe.name, tensor


def prepare(
    source: Path,
    target: str,
    *,
    dtype: str | None = None,
    truth: str | None = None,
    gelu: str | None = None,
    local_keys: int | None = None,
    seed: int | None = None,
    model: Sequence[str] | None = None,
    maxtext_config: Path | None = None,
) -> Conversion:
    """Finds out what ``source`` is and how it becomes ``target``, one of ``FORMATS``.

    Args:
        dtype: of the result, ``fp32`` or ``bf16``; None keeps the source's.
        truth: ``original`` or ``merged`` instead of what upstream's tensors say, see :func:`upstream.find_truth`.
        gelu, local_keys: instead of what is known of an upstream folder, see :func:`read_upstream`.
        seed: of the compose weights that a plain Transformer gets; None is 0.
        maxtext_config: YAML of the MaxText run; None looks for config.yml in its folders.
        model: ``key=value`` of the model that a plain Transformer becomes, see :func:`transformers.read_config`.

    Raises:
        ConversionError: it cannot be; everything in the way is listed.
    """
    found = detect(source)
    if found.kind == target != "dcscale":
        raise ConversionError(f"{found.description} is what it shall become: convert it to dcscale")
    options = {
        "upstream": {"--from-copies": truth, "--gelu": gelu, "--local-keys": local_keys},
        "maxtext": {"--maxtext-config": maxtext_config},
        "transformers": {"--seed": seed, "--model": model},
    }
    for kind, given in options.items():
        names = ", ".join(name for name, value in given.items() if value is not None)
        if names and kind != found.kind:
            raise ConversionError(
                f"{names}: only for {kind} folders, but the source is a {found.description}; leave it out"
            )
    if found.kind != "dcscale" and target != "dcscale":
        raise ConversionError(
            f"{found.description} becomes {target} by way of dcscale only: convert it to dcscale first"
        )
    if found.kind == "upstream":
        return _from_upstream(found, dtype, truth, gelu, local_keys)
    if found.kind == "huggingface":
        return _from_huggingface(found, dtype)
    if found.kind == "maxtext":
        return _from_maxtext(found, dtype, maxtext_config)
    if found.kind == "transformers":
        return _from_transformers(found, dtype, seed or 0, model or ())
    return _from_dcscale(found, target, dtype)


def convert(source: Path, target_folder: Path, target: str, *, overwrite: bool = False, **options: Any) -> Conversion:
    """:func:`prepare` and write."""
    check_target(source, target_folder, overwrite)
    conversion = prepare(source, target, **options)
    conversion.write(target_folder)
    return conversion


def _from_dcscale(found: Source, target: str, dtype: str | None) -> Conversion:
    try:
        config, content = read_config(found.folder), read_state(found.folder)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    files = open_tensors(found.folder / WEIGHTS)
    tokenizer = content.get("tokenizer")
    if tokenizer is not None and not (isinstance(tokenizer, dict) and {"spec", "eos_id"} <= tokenizer.keys()):
        raise ConversionError(f"{found.folder / STATE} has a tokenizer without spec and eos_id: {tokenizer!r}")
    settings, notes, beside = None, [], {}
    if target == "huggingface":
        common = DTYPES[dtype] if dtype else functools.reduce(torch.promote_types, files.dtypes.values())
        plan = _same_names(config.model)
        settings = huggingface.write_settings(config, str(common).removeprefix("torch."), tokenizer)
        beside, about = huggingface.files_beside(config, tokenizer, found.folder / TOKENIZER)
        notes += about
    elif target == "upstream":
        written = upstream_config.write_upstream(config)
        common = DTYPES[dtype] if dtype else functools.reduce(torch.promote_types, files.dtypes.values())
        plan = upstream.plan_export(config.model, common)
        name = str(common).removeprefix("torch.")
        settings = upstream_config.upstream_settings(written, name, tokenizer)
        notes += written.notes
    else:
        common = DTYPES[dtype] if dtype else None
        plan = _same_names(config.model)
        if dtype:
            config = replace(config, train=replace(config.train, precision=dtype))
    check_names(plan, files)
    kept = {key: content[key] for key in ("step", "tokens", "versions", "tokenizer") if key in content}
    state = {"format": STATE_FORMAT, **kept}
    return Conversion(found, files, target, config, plan, common, state, settings, notes, beside)


def _same_names(model: ModelConfig) -> Plan:
    shapes = upstream.parameter_shapes(model)
    return Plan([TensorRule(name, (name,)) for name in shapes], shapes, {})


def _from_huggingface(found: Source, dtype: str | None) -> Conversion:
    files = open_tensors(found.folder)
    config = huggingface.read_settings(found.settings)
    _check_layers("layers", found.settings, files)
    plan = _same_names(config.model)
    check_names(plan, files)
    return _import(found, files, config, plan, dtype, [], _has_byte_tokens(found))


def _from_upstream(
    found: Source, dtype: str | None, truth: str | None, gelu: str | None, local_keys: int | None
) -> Conversion:
    files = open_tensors(found.folder)
    decided, why = upstream.find_truth(files)
    truth = truth or decided
    notes = [f"trained tensors of compose: {truth}, " + (why if truth == decided else f"as asked, though {why}")]
    settings = found.settings
    _check_layers("n_layer", settings, files)
    if truth == "merged" and gelu is None:
        gelu = "erf"
        notes.append("GELU of the compose projection: erf, as in upstream's PyTorch code (--gelu says otherwise)")
    window = settings.get("window_size", 256)
    if truth == "merged" and local_keys is None and settings["model_type"] == "dcformer" and type(window) is int:
        local_keys = window + 1
        notes.append(
            f"windows: {local_keys} keys, as upstream's PyTorch training shows one more than window_size "
            "(--local-keys says otherwise)"
        )
    tied = _tied(settings, files, "tok_embeddings.weight", "output.weight", notes)
    read = upstream_config.read_upstream(settings, tied=tied, gelu=gelu, local_keys=local_keys)
    query_wise = settings.get("query_wise") is True
    plan = upstream.plan_import(read.config.model, files.shapes, truth or "original", query_wise)
    check_names(plan, files)
    if truth is None:
        raise ConversionError(
            f"{files.source} does not say whether dw1, dd, qkw or dw_m, qkw_m were trained: {why}; say so with "
            "--from-copies merged or original"
        )
    return _import(found, files, read.config, plan, dtype, [*notes, *read.notes], _has_byte_tokens(found))


def _from_transformers(found: Source, dtype: str | None, seed: int, model: Sequence[str]) -> Conversion:
    files, settings, notes = open_tensors(found.folder), found.settings, []
    family = settings["model_type"]
    _check_layers("num_hidden_layers", settings, files)
    embedding, output = (
        f"{transformers.source_module(part, family, files.shapes)}.weight" for part in ("embedding", "output")
    )
    tied = _tied(settings, files, embedding, output, notes)
    read = transformers.read_config(settings, tied=tied, overrides=model)
    plan = transformers.plan_upcycle(read.config.model, family, read.biases, files.dtypes, seed)
    check_names(plan, files)
    if read.config.model.attention == "dcmha":
        notes.append("compose begins at the identity")
    return _import(found, files, read.config, plan, dtype, [*notes, *read.notes])


def _from_maxtext(found: Source, dtype: str | None, config: Path | None) -> Conversion:
    places = [folder / "config.yml" for folder in (found.folder, *found.folder.parents[:3])]
    config = config or next((place for place in places if place.is_file()), None)
    if config is None:
        raise ConversionError(
            f"{found.description} does not say its windows: name the YAML config of its run, such as upstream's "
            f"dcformer_pp_405m.yml, with --maxtext-config (looked for {', '.join(map(str, places))})"
        )
    settings = maxtext.read_settings(config)
    files = MaxTextFiles(found.folder, settings["param_scan_axis"])
    read, notes = maxtext.read_model(files, settings)
    plan = maxtext.plan_maxtext(read.model, settings["num_layers_per_block"])
    check_names(plan, files)
    return _import(found, files, read, plan, dtype, [f"settings are those in {config}", *notes])


def _import(
    found: Source,
    files: TensorFiles,
    config: Config,
    plan: Plan,
    dtype: str | None,
    notes: list[str],
    byte: bool = False,
) -> Conversion:
    """The conversion to a model folder. ``byte``: its tokens are bytes."""
    common = DTYPES[dtype] if dtype else None
    types = {common} if common else {files.dtypes[source] for recipe in plan.recipes for source in recipe.sources}
    config.train.precision = "bf16" if types == {torch.bfloat16} else "fp32"
    state, tokenizer_notes = _state(found, byte)
    return Conversion(found, files, "dcscale", config, plan, common, state, None, [*notes, *tokenizer_notes])


def _has_byte_tokens(found: Source) -> bool:
    """Whether dcscale wrote so into config.json."""
    return found.settings.get("dcscale", {}).get("tokenizer") == "byte"


def _check_layers(key: str, settings: Mapping[str, Any], files: TensorFiles) -> None:
    layers = settings.get(key)
    if type(layers) is int and layers > len(files.shapes):
        raise ConversionError(f"{key} is {layers}, but {files.source} has only {len(files.shapes)} tensors")


def _tied(settings: Mapping[str, Any], files: TensorFiles, embedding: str, output: str, notes: list[str]) -> bool:
    if settings.get("tie_word_embeddings") is not True:
        return False
    if output not in files.shapes or embedding not in files.shapes:
        return True
    if torch.equal(files.read(output), files.read(embedding)):
        return True
    notes.append(f"tie_word_embeddings is set, but {output} differs from the embedding: they are not tied here")
    return False


def _state(found: Source, byte: bool) -> tuple[dict[str, Any], list[str]]:
    """The state of a model from elsewhere: nothing but its tokenizer is known. ``byte``: its tokens are bytes."""
    state: dict[str, Any] = {"format": STATE_FORMAT, "step": 0, "tokens": 0}
    eos = found.settings.get("eos_token_id")
    if isinstance(eos, list) and eos:  # the first ends a document, the others a turn of a conversation
        eos = eos[0]
    if type(eos) is int and byte:
        state["tokenizer"] = {"spec": "byte", "eos_id": eos}
    elif type(eos) is int and (found.folder / TOKENIZER).is_file():
        state["tokenizer"] = {"spec": TOKENIZER, "eos_id": eos}
    else:
        return state, [f"no {TOKENIZER} with an eos_token_id: texts need a tokenizer, named by --tokenizer"]
    return state, []
