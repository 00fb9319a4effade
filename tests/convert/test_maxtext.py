"""Orbax checkpoints of upstream's JAX code (tests/golden/maxtext/README.md) give the same logits in dcscale."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import yaml

from dcscale.checkpoint.layout import read_config
from dcscale.convert import ConversionError, convert, prepare
from dcscale.models import DCFormer
from dcscale.testing.models import load_tensors, tensors_of

DATA = Path(__file__).parents[1] / "golden" / "maxtext"
CASES = ("scanned", "ocdbt", "numbered")
TOLERANCE = 1e-4
"""Largest absolute error of logits of the order 1: both sides compute in float32."""

PREFIX = "params.decoder.layers."
ATTENTION = PREFIX + "self_attention_0."
STATIC = ATTENTION + "AttentionOp_0.pre_proj.w"


def unpack(name, folder):
    with tarfile.open(DATA / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def logits_of(folder, ids):
    model = DCFormer(read_config(folder).model)
    load_tensors(model, folder)
    with torch.no_grad():
        return model(ids)


def values_of(run):
    with np.load(run / "io.npz", allow_pickle=False) as values:
        return torch.from_numpy(values["input_ids"]), torch.from_numpy(values["logits"])


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_upstreams_jax_code(name, tmp_path):
    run = unpack(name, tmp_path)
    done = convert(run, tmp_path / "model", "dcscale")
    ids, logits = values_of(run)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits_of(tmp_path / "model", ids), logits, atol=TOLERANCE, rtol=0)
    model = read_config(tmp_path / "model").model
    assert (model.layers, model.windows, model.qk_norm, model.compose.gelu) == (4, [6, None], name != "ocdbt", "tanh")
    assert done.source.description == f"MaxText checkpoint {run / 'checkpoints' / '7' / 'state'}"
    assert "2 arrays that are not parameters (optimizer, step) are not read" in done.notes
    # Exporting to upstream's PyTorch layout and back gives the same tensors, so no axis was mixed up.
    convert(tmp_path / "model", tmp_path / "exported", "upstream")
    convert(tmp_path / "exported", tmp_path / "again", "dcscale")
    first, again = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "again")
    assert all(torch.equal(first[key], again[key]) for key in first)


class Run:
    """The run ``scanned``, whose arrays and settings may be changed."""

    def __init__(self, folder):
        self.folder = unpack("scanned", folder)
        self.state = self.folder / "checkpoints" / "7" / "state"

    def array(self, name, **options):
        store = {"driver": "file", "path": f"{self.state / name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": store}, **options).result()

    def write(self, name, values, dtype=None):
        values = np.asarray(values)
        shutil.rmtree(self.state / name, ignore_errors=True)
        new = self.array(name, create=True, shape=values.shape, dtype=dtype or values.dtype.name)
        new.write(values.astype(new.dtype.numpy_dtype)).result()

    def settings(self, **changes):
        content = yaml.safe_load((self.folder / "config.yml").read_text())
        content = {key: value for key, value in {**content, **changes}.items() if value != "gone"}
        (self.folder / "config.yml").write_text(yaml.safe_dump(content))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_any_folder_of_the_run_can_be_converted(run, tmp_path):
    state = run.state
    newer = run.folder / "checkpoints" / "10" / "default"
    shutil.copytree(state, newer)
    (run.folder / "checkpoints" / "11.orbax-checkpoint-tmp-3" / "state").mkdir(parents=True)
    for folder, found in (
        (run.folder, newer),
        (run.folder / "checkpoints", newer),
        (state.parent, state),
        (state, state),
    ):
        assert prepare(folder, "dcscale").source.folder == found
    settings = (run.folder / "config.yml").rename(tmp_path / "elsewhere.yml")
    with pytest.raises(
        ConversionError, match="does not state its windows: name the YAML config of its run,.*scanned/config.yml"
    ):
        prepare(run.folder, "dcscale")
    done = prepare(run.folder, "dcscale", maxtext_config=settings)
    assert f"settings are from {settings}" in done.notes


def test_dtypes_are_kept_or_chosen(run, tmp_path):
    """Upstream's parameters for inference are bfloat16."""
    before = {}
    for path in run.state.glob("params.*"):
        before[path.name] = run.array(path.name).read().result()
        run.write(path.name, before[path.name], "bfloat16")
    convert(run.folder, tmp_path / "model", "dcscale")
    converted = tensors_of(tmp_path / "model")
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    assert read_config(tmp_path / "model").train.precision == "bf16"
    embedding = torch.from_numpy(before["params.token_embedder.embedding"])
    assert torch.equal(converted["embedding.weight"], embedding.bfloat16())
    convert(run.folder, tmp_path / "wide", "dcscale", dtype="fp32")
    assert torch.equal(tensors_of(tmp_path / "wide")["norm.weight"], converted["norm.weight"].float())


def test_parts_of_compose(run, tmp_path):
    run.settings(post_compose=False, query_wise=False)
    notes = convert(run.folder, tmp_path / "pre", "dcscale").notes
    assert "post_compose is false: its parts of dyn_w_proj are dropped" in notes
    assert "query_wise is False, but upstream's code does not read it: compose has both sides" in notes
    pre, whole = read_config(tmp_path / "pre").model, tensors_of(tmp_path / "pre")
    assert (pre.compose.pre, pre.compose.post, pre.compose.query_wise) == (True, False, True)
    run.settings(pre_compose=True, post_compose=True)
    convert(run.folder, tmp_path / "all", "dcscale")
    everything = tensors_of(tmp_path / "all")
    for kind, part in (("dw1", np.s_[:, :2]), ("qkw", np.s_[:2]), ("dd", np.s_[:, :8])):
        name = f"blocks.2.attention.compose.{kind}"
        assert torch.equal(whole[name], everything[name][part])
    run.settings(pre_compose=False, post_compose=False)
    done = convert(run.folder, tmp_path / "none", "dcscale")
    assert "pre_compose and post_compose are false: a plain Transformer; its dyn_w_proj are dropped" in done.notes[1]
    assert sum("dropped: decoder.layers.*.self_attention_" in line for line in done.lines()) == 6
    assert read_config(tmp_path / "none").model.attention == "mha"


def test_the_static_projection_must_be_zero(run, tmp_path):
    run.write(STATIC, np.zeros((1, 2, 4, 4), np.float32))
    convert(run.folder, tmp_path / "model", "dcscale")
    run.write(STATIC, np.broadcast_to(np.eye(4, dtype=np.float32), (1, 2, 4, 4)))
    with pytest.raises(ConversionError, match="pre_proj.w is a static head projection, which dcscale does not have"):
        convert(run.folder, tmp_path / "static", "dcscale")
    assert not (tmp_path / "static").exists()


def test_tied_embeddings(run, tmp_path):
    run.settings(logits_via_embedding=True, normalize_embedding_logits=False)
    with pytest.raises(ConversionError, match="logits_dense.kernel .* is not part of the model"):
        prepare(run.folder, "dcscale")
    shutil.rmtree(run.state / "params.decoder.logits_dense.kernel")
    convert(run.folder, tmp_path / "model", "dcscale")
    assert read_config(tmp_path / "model").model.tied_embeddings


SETTINGS = {
    "block": ({"decoder_block": "llama2"}, "decoder_block is 'llama2', but only 'dcformer' is supported"),
    "activations": ({"mlp_activations": ["gelu", "linear"]}, "mlp_activations is .* but only"),
    "experts": ({"num_experts": 8}, "num_experts is 8, but only 1 is supported"),
    "positions": ({"use_untrainable_positional_embedding": True}, "use_untrainable_positional_embedding is True"),
    "scaled logits": ({"logits_via_embedding": True}, "logits_via_embedding with normalize_embedding_logits scales"),
    "windows": ({"window_size": [6]}, r"window_size is \[6\], but must list one window for each of .* = 2 layers"),
    "no windows": ({"window_size": "gone"}, "window_size is missing"),
    "not composed": ({"pre_compose": "gone"}, "pre_compose is missing"),
    "switch": ({"post_compose": "yes"}, "post_compose is 'yes', but must be true or false"),
    "group": ({"num_layers_per_block": 0}, "num_layers_per_block is 0, but must be an integer of at least 1"),
    "another group": ({"num_layers_per_block": 1, "window_size": [6]}, "self_attention_1.* is not part of the model"),
    "axis": ({"param_scan_axis": -1}, "param_scan_axis is -1, but must be an integer of at least 0"),
    "axis beyond": ({"param_scan_axis": 2}, "without the axis 2 of scanned layers"),
    "another model": (
        {"base_emb_dim": 32, "vocab_size": 50256, "base_num_decoder_layers": 24},
        "for another model: vocab_size is 50256 in the config, 31 in .*; base_emb_dim is 32 .*; base_num_decoder",
    ),
    "no epsilon": ({"normalization_layer_epsilon": "gone"}, "normalization_layer_epsilon is missing"),
    "epsilon": ({"normalization_layer_epsilon": "small"}, "model.norm_eps"),
    "unknown": (
        {"rope_max_timescale": 500, "model_name": "llama2-7b", "quantization": "int8", "tokenizer_path": ""},
        "does not know: model_name='llama2-7b', quantization='int8', rope_max_timescale=500; remove from .*config.yml",
    ),
    "window": ({"window_size": [0, None]}, r"model.windows\[0\] = 0"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_refused(name, run):
    changes, message = SETTINGS[name]
    run.settings(**changes)
    with pytest.raises(ConversionError, match=message):
        prepare(run.folder, "dcscale")


def test_sizes_that_a_scale_multiplies_are_not_compared(run):
    run.settings(global_parameter_scale=2, base_emb_dim=8, base_num_decoder_layers=4, vocab_size=31)
    assert prepare(run.folder, "dcscale").config.model.dim == 16


def test_files_that_are_not_a_config(run, tmp_path):
    file = tmp_path / "c.yml"
    for content, message in (
        ("[1]", "must be a mapping of upstream's settings, but is a list"),
        ("{", "cannot be read"),
        ("a: " + "[" * 100_000, "cannot be read: nested too deeply"),
        ("a: &a [1]\nb: *a", "cannot be read: .*alias"),
        ("a: \xff", "cannot be read: .*utf-8"),
    ):
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(ConversionError, match=message):
            prepare(run.folder, "dcscale", maxtext_config=file)
    with pytest.raises(ConversionError, match="gone.yml cannot be read"):
        prepare(run.folder, "dcscale", maxtext_config=tmp_path / "gone.yml")


def test_all_invalid_arrays_are_listed(run):
    shutil.rmtree(run.state / (ATTENTION + "value.kernel"))
    run.write(PREFIX + "mlp_0.mgate_layer.kernel", np.ones((16, 2, 3), np.float32))
    run.write("params.decoder.decoder_norm.scale", np.ones(15, np.float32))
    run.write(ATTENTION + "q_norm.scale", np.ones((4, 2), np.int32))
    with pytest.raises(ConversionError) as error:
        prepare(run.folder, "dcscale")
    for part in (
        "decoder.layers.1.self_attention_0.value.kernel is missing",
        "decoder.layers.0.mlp_0.mgate_layer.kernel [16, 3] is not part of the model",
        "decoder.decoder_norm.scale has shape [15], the config requires [16]",
        "decoder.layers.0.self_attention_0.q_norm.scale is torch.int32: weights must be floating point",
    ):
        assert part in str(error.value)


def test_a_type_that_torch_does_not_have(run):
    run.write("params.decoder.decoder_norm.scale", np.ones(16), "float8_e4m3b11fnuz")
    with pytest.raises(
        ConversionError, match="decoder_norm.scale .* has the type float8_e4m3b11fnuz, which torch does not have"
    ):
        prepare(run.folder, "dcscale")


def test_an_unknown_tree_is_refused_with_its_names(run):
    (run.state / "params.token_embedder.embedding").rename(run.state / "params.decoder.wte")
    with pytest.raises(ConversionError, match="is not upstream's DCFormer: .*it has decoder.decoder_norm.*wte"):
        prepare(run.folder, "dcscale")


def test_corrupt_values(run, tmp_path):
    """By default, a missing chunk is read as zeros."""
    name = PREFIX + "mlp_1.wo.kernel"
    values = run.array(name).read().result()
    values[3, 1, 2] = np.nan
    run.write(name, values)
    with pytest.raises(ConversionError, match="blocks.3.ffn.down.weight .* 1 NaN and 0 infinite of 384"):
        convert(run.folder, tmp_path / "model", "dcscale")
    (chunk,) = [path for path in (run.state / name).iterdir() if path.name != ".zarray"]
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(ConversionError, match=f"{name} in .* cannot be read"):
        convert(run.folder, tmp_path / "model", "dcscale")
    chunk.unlink()
    with pytest.raises(ConversionError, match=f"{name} in .* cannot be read: .*missing"):
        convert(run.folder, tmp_path / "model", "dcscale")
    (run.state / name / ".zarray").write_text("{")
    with pytest.raises(ConversionError, match=f"{name} in .* cannot be read"):
        prepare(run.folder, "dcscale")
    assert not (tmp_path / "model").exists()


def test_a_corrupt_database(tmp_path):
    run = unpack("ocdbt", tmp_path)
    manifest = run / "checkpoints" / "7" / "state" / "manifest.ocdbt"
    manifest.write_bytes(b"not a manifest")
    with pytest.raises(ConversionError, match="state cannot be read"):
        prepare(run, "dcscale")


def test_an_axis_that_is_not_one_of_layers(run):
    run.write(PREFIX + "mlp_0.wo.kernel", np.zeros((24, 1001, 1), np.float32))
    with pytest.raises(ConversionError, match="with more than 1000 layers on axis 1: is that param_scan_axis"):
        prepare(run.folder, "dcscale")


def test_other_formats_of_zarr_are_refused(run):
    (run.state / "params.other").mkdir()
    (run.state / "params.other" / "zarr.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"is in zarr's format 3 \(params.other/zarr.json\): only format 2"):
        prepare(run.folder, "dcscale")


def test_options_that_cannot_be_combined(run, monkeypatch):
    with pytest.raises(ConversionError, match="cannot be converted to upstream directly: convert it to dcscale first"):
        prepare(run.folder, "upstream")
    with pytest.raises(
        ConversionError, match="--seed: only for transformers and gguf models, but the source is a MaxText"
    ):
        prepare(run.folder, "dcscale", seed=1)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ConversionError, match="needs the tensorstore package: pip install tensorstore"):
        prepare(run.folder, "dcscale")
