"""Sources that cannot be converted: every error of tools/convert_checkpoint.py, and its message."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from dcscale.checkpoint.layout import seal
from dcscale.config.schema import ComposeConfig
from dcscale.convert import ConversionError, convert, prepare
from dcscale.convert.tensor_files import open_tensors
from dcscale.testing.models import tiny_config, write_checkpoint

COMPOSE = "layers.0.attention.dyn_w_proj."
TENSORS = {
    "missing": (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
    "unknown": (
        lambda t: t.update({"lm_head.weight": torch.ones(2)}),
        r"lm_head.weight \[2\] is not part of the model",
    ),
    "of another layer": (
        lambda t: t.update({"layers.2.ffn_norm.weight": torch.ones(32)}),
        r"layers.2.ffn_norm.weight \[32\] is not part of the model",
    ),
    "twice": (
        lambda t: t.update({"layers.0.attention.wq.weight": torch.ones(32, 32)}),
        r"layers.0.attention.wq.weight \[32, 32\] is not part of the model",
    ),
    "misshapen": (
        lambda t: t.update({"norm.weight": torch.ones(31)}),
        r"norm.weight has shape \[31\], the config requires \[32\]",
    ),
    "empty": (
        lambda t: t.update({"output.weight": torch.ones(0, 32)}),
        r"output.weight has shape \[0, 32\], the config requires \[61, 32\]",
    ),
    "misshapen copy": (
        lambda t: t.update({COMPOSE + "qkw_m": torch.ones(4, 1)}),
        r"qkw_m has shape \[4, 1\], the config requires \[4, 16, 16\]",
    ),
    "static": (
        lambda t: t.update({COMPOSE + "pre_proj.w": torch.ones(1, 4, 4)}),
        "pre_proj.w is a static head projection",
    ),
    "not a number": (lambda t: t["norm.weight"].fill_(torch.nan), "norm.weight .* 32 NaN and 0 infinite of 32"),
    "infinite": (lambda t: t["output.weight"][0].fill_(torch.inf), "output.weight .* 0 NaN and 32 infinite of 1952"),
    "integer": (
        lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int32)}),
        "norm.weight is torch.int32: weights must be floating point, float16, bfloat16, float32, float64",
    ),
    "no tensor of many layers": (
        lambda t: t.clear() or t.update(a=torch.ones(1)),
        "n_layer is 2, but .* only 1 tensors",
    ),
    "overflow": (
        lambda t: t.update(
            {name: tensor.double() * (1e300 if name == "norm.weight" else 1) for name, tensor in t.items()}
        ),
        "norm.weight .* 0 NaN and 32 infinite of 32",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, tmp_path, upstream_of):
    change, message = TENSORS[name]
    folder = upstream_of()
    change(folder.tensors)
    with pytest.raises(ConversionError, match=message):
        convert(folder.write(), tmp_path / "model", "dcscale", dtype="fp32")
    assert not list(tmp_path.glob("model*"))
    assert not list(tmp_path.glob(".*"))


def test_all_problems_are_listed_at_once(tmp_path, upstream_of):
    folder = upstream_of()
    del folder.tensors["norm.weight"]
    folder.tensors |= {"a": torch.ones(1), "output.weight": torch.ones(3, 3)}
    with pytest.raises(ConversionError) as error:
        prepare(folder.write(), "dcscale")
    for part in ("norm.weight is missing", "a [1] is not part of the model", "output.weight has shape [3, 3]"):
        assert part in str(error.value)


SETTINGS = {
    "unknown family": (
        {"model_type": "gemma"},
        "model_type 'gemma', which cannot be converted: .* dcformer, dcpythia .* dcscale .* llama, .*, gpt_neox",
    ),
    "no family": ({"model_type": ["dcformer"]}, r"has model_type \['dcformer'\], which cannot be converted"),
    "text": ({"n_head": "4"}, "n_head is '4', but must be an integer of at least 1"),
    "zero": ({"n_layer": 0}, "n_layer is 0, but must be an integer of at least 1"),
    "many layers": ({"n_layer": 10**9}, "n_layer is 1000000000, but .* has only 35 tensors"),
    "heads": ({"n_head": 5}, "n_head 5 does not divide dim 32"),
    "no switch": ({"use_dcmha": "no"}, "use_dcmha is 'no', but must be true or false"),
    "unknown": (
        {"rope_scaling": 2, "is_causal": False, "temperature": 0.5, "attn_logit_softcapping": None},
        "does not know: rope_scaling=2, is_causal=False; remove from config.json those",
    ),
    "static projection": ({"use_sw": True}, "use_sw is set: dcscale has no static head projection"),
    "window type": ({"window_type": "LLLG"}, "window_type is 'LLLG', but must be LG, LGLL, LGL6 or null"),
    "window type as list": ({"window_type": ["LG"]}, r"window_type is \['LG'\], but must be LG"),
    "window type without a window": ({"window_type": "LG", "window_size": None}, "window_size is null"),
    "window": ({"window_size": 0}, r"model.windows\[0\] = 0"),
    "grouped queries": ({"n_local_heads": 3}, "model.kv_heads = 3"),
    "type": ({"norm_eps": "small"}, "norm_eps"),
    "multi-gate": ({"mgate": True, "mgate_dim": 7}, "model.multi_gate = 7"),
    "beyond": (
        {"dcscale": {"heads": 3}},
        "its key dcscale is .* may only have the keys compose, qk_norm_eps, tokenizer",
    ),
    "beyond compose": ({"dcscale": {"compose": {"order": 1}}}, "its key dcscale.compose has the unknown keys order"),
    "branches off that are not zero": (
        {"dcscale": {"compose": {"post": False}}},
        "is not zero in parts of compose that are off according to the key dcscale",
    ),
    "parts off that are not zero": ({"dcscale": {"compose": {"gates": False}}}, "dyn_w_proj.dd is not zero"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, tmp_path, upstream_of):
    changes, message = SETTINGS[name]
    folder = upstream_of()
    folder.settings |= changes
    with pytest.raises(ConversionError, match=message):
        convert(folder.write(), tmp_path / "model", "dcscale")
    assert not (tmp_path / "model").exists()


def test_notes_on_settings_and_windows(upstream_of):
    folder = upstream_of(windows=[256, None])
    folder.settings |= {"head_dim": 64, "window_type": "LG", "window_size": 100, "use_dcmha": False}
    notes = "\n".join(prepare(folder.write(), "dcscale").notes)
    for part in (
        "head_dim is 64, but upstream uses dim / n_head = 8",
        "window_size 100 is used; with window_type LG upstream's code ignores it and uses 256",
        "use_dcmha is false: a plain Transformer",
    ):
        assert part in notes


def test_copies_that_do_not_show_which_was_trained(upstream_of):
    folder = upstream_of()
    generator = torch.Generator().manual_seed(0)
    first, second = (f"layers.{layer}.attention.dyn_w_proj." for layer in (0, 1))
    truth = folder.tensors[first + "dw_m"]
    noise = torch.randn(truth.shape, generator=generator)
    folder.tensors[first + "dw_m"] = noise
    with pytest.raises(
        ConversionError, match="the layers disagree: original in layers 0; equal in layers 1; choose with"
    ):
        prepare(folder.write(), "dcscale")
    done = prepare(folder.write(), "dcscale", from_copies="original")
    assert "original, as requested, although the layers disagree" in done.notes[0]
    # Equal dw_m, other qkw_m: half of a training cannot be.
    folder.tensors[first + "dw_m"] = truth
    for prefix in (first, second):
        folder.tensors[prefix + "qkw_m"] = torch.ones(4, 16, 16)
    with pytest.raises(ConversionError, match="neither equal to the originals, nor clearly related or independent"):
        prepare(folder.write(), "dcscale")
    for prefix in (first, second):
        folder.tensors[prefix + "dw_m"] = torch.full_like(truth, torch.nan)
    with pytest.raises(ConversionError, match="--from-copies merged or original"):
        prepare(folder.write(), "dcscale")
    for prefix in (first, second):
        folder.tensors[prefix + "dw_m"] = torch.ones(3, 3)
    with pytest.raises(ConversionError, match=r"dw_m has shape \[3, 3\], the config requires \[32, 80\]"):
        prepare(folder.write(), "dcscale")


MODELS = {
    "rank": ({"compose": ComposeConfig(rank=1)}, "model.compose.rank is 1, upstream's DCFormer only has 2"),
    "kv_heads": ({"kv_heads": 2}, "model.kv_heads is 2, upstream's DCFormer only has 4"),
    "head_dim": ({"head_dim": 16}, "model.head_dim is 16, upstream's DCFormer only has 8.0"),
    "heads": ({"heads": 1}, "model.heads is 1, upstream only has rank 2 for even numbers"),
    "bias": ({"bias": True}, "model.bias is True, upstream's DCFormer only has False"),
    "parallel": ({"parallel_residual": True}, "model.parallel_residual is True"),
    "rope": ({"rope_fraction": 0.5}, "model.rope_fraction is 0.5"),
    "ffn": ({"ffn": "gelu"}, "model.ffn is 'gelu', upstream's DCFormer only has 'swiglu'"),
    "ffn of pythia": ({"norm": "layernorm"}, "model.ffn is 'swiglu', upstream's DCPythia only has 'gelu'"),
    "local only": ({"windows": [5]}, r"model.windows is \[5\], upstream has LG, LGLL, LGL6 with one window"),
    "two windows": ({"windows": [5, None, 6, None], "layers": 4}, r"model.windows is \[5, None, 6, None\]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_upstream_cannot_represent(name, tmp_path):
    changes, message = MODELS[name]
    source = write_checkpoint(tmp_path / "model", tiny_config(**changes))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "exported", "upstream")
    assert not (tmp_path / "exported").exists()


def test_notes_on_what_upstream_computes_differently(tmp_path):
    model = tiny_config(windows=[5, None, 5, 5], layers=4, qk_norm_eps=1e-5)
    notes = "\n".join(prepare(write_checkpoint(tmp_path / "model", model), "upstream").notes)
    for part in ("uses erf GELU", "1e-6 for qk_norm_eps, this model uses 1e-05", "256 with LGLL"):
        assert part in notes


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_but_tensors_is_unpickled(tmp_path, upstream_of):
    folder = upstream_of().folder
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"norm.weight": Malicious(tmp_path / "ran")}, file)
    with pytest.raises(ConversionError, match="cannot be read: .* nothing else is unpickled"):
        prepare(folder, "dcscale")
    file.write_bytes(pickle.dumps({"norm.weight": Malicious(tmp_path / "ran")}))
    with pytest.raises(ConversionError, match="pytorch_model.bin cannot be read"):
        prepare(folder, "dcscale")
    assert not (tmp_path / "ran").exists()
    torch.save([torch.ones(1)], file)
    with pytest.raises(ConversionError, match="has a list, expected a dictionary of tensors"):
        prepare(folder, "dcscale")
    torch.save({"norm.weight": "text"}, file)
    with pytest.raises(ConversionError, match="'norm.weight' is a str, expected named dense tensors"):
        prepare(folder, "dcscale")
    file.write_bytes(b"no archive")
    with pytest.raises(ConversionError, match="pytorch_model.bin cannot be read"):
        prepare(folder, "dcscale")
    file.unlink()
    with pytest.raises(ConversionError, match="has no weights: looked for model.safetensors.index.json"):
        prepare(folder, "dcscale")


@pytest.mark.parametrize("name", ["deep JSON", "unknown setting", "expanded tensor"])
def test_the_tool_prints_one_line(name, tmp_path, upstream_of, call):
    folder = upstream_of()
    if name == "unknown setting":
        folder.settings["is_causal"] = False
    folder.write()
    if name == "deep JSON":
        (folder.folder / "config.json").write_text('{"a":' * 100_000)
    if name == "expanded tensor":
        (folder.folder / "model.safetensors").unlink()
        torch.save({"output.weight": torch.zeros(1).expand(10**9)}, folder.folder / "pytorch_model.bin")
    code, _, output = call(folder.folder, tmp_path / "model", "--to", "dcscale")
    assert (code, len(output.splitlines())) == (2, 1)
    wanted = {"deep JSON": "nested too deeply", "unknown setting": "is_causal=False", "expanded tensor": "fewer values"}
    assert wanted[name] in output


class View:
    """Unpickled as ``shape`` and ``strides`` over the storage of one element: torch.save does not write such views."""

    def __init__(self, shape, strides):
        self.arguments = (shape, strides)

    def __reduce__(self):
        storage = torch.zeros(1).untyped_storage()
        storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, *self.arguments, False, OrderedDict())


class Meta:
    def __reduce__(self):
        return torch._utils._rebuild_meta_tensor_no_storage, (torch.float32, (10**6, 10**6), (10**6, 1), False)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**9),
        torch.zeros(3, 1, 4).expand(3, 10**9, 4),
        torch.arange(10.0).as_strided((5, 5), (1, 1)),
        torch.arange(100.0).as_strided((4, 4), (3, 1)),
        View((2**31, 2**31), (0, 0)),
        Meta(),
    ],
    ids=["one value", "one axis", "overlap", "overlap in a large storage", "crafted", "no storage"],
)
def test_tensors_with_fewer_values_than_their_shape(tensor, tmp_path, upstream_of):
    folder = upstream_of()
    (folder.folder / "model.safetensors").unlink()
    torch.save({**folder.tensors, "output.weight": tensor}, folder.folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: output.weight has fewer values than its shape \["):
        prepare(folder.folder, "dcscale")


@pytest.mark.parametrize("view", [View((10**9,), (1,)), View((2,), (-1,)), View((2**33, 2**33), (0, 0))])
def test_views_beyond_their_storage(view, tmp_path, upstream_of):
    folder = upstream_of().folder
    (folder / "model.safetensors").unlink()
    torch.save({"output.weight": view}, folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="pytorch_model.bin cannot be read: "):
        prepare(folder, "dcscale")


def test_views_without_overlap_are_read(tmp_path):
    tensors = {
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "every second": torch.arange(8.0)[::2],
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(1.0),
        "one row": torch.arange(4.0).expand(1, 4),
        "permuted": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    files = open_tensors(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor), name


def test_a_damaged_pickle(tmp_path):
    """Damage at every place of the pickle raises errors of many types."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.zeros(4, 4), "b": torch.ones(3)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    causes = set()
    for place in range(2, len(pickled)):  # after the protocol's number, which is only warned about
        damaged = bytearray(pickled)
        damaged[place] ^= 0x55
        path.write_bytes(content.replace(pickled, damaged))
        try:
            open_tensors(tmp_path)
        except ConversionError as error:
            causes.add(type(error.__cause__))
    assert {KeyError, IndexError, pickle.UnpicklingError} <= causes


def test_files_of_an_index(tmp_path, upstream_of):
    folder = upstream_of().folder
    index = folder / "model.safetensors.index.json"
    for content, message in (
        ("{", "index.json cannot be read"),
        ('{"weight_map": []}', "index.json has a weight_map of type list"),
        ('{"weight_map": {"a": "\\u0000.safetensors"}}', "must be in the same folder"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "must be in the same folder"),
        ('{"weight_map": {"a": 3}}', "names the file 3, but its files must be in the same folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors cannot be read as safetensors"),
    ):
        index.write_text(content)
        with pytest.raises(ConversionError, match=message):
            prepare(folder, "dcscale")
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index.write_text('{"weight_map": {"a": "copy.safetensors", "b": "model.safetensors"}}')
    with pytest.raises(ConversionError, match="is in two of its files; remove one"):
        prepare(folder, "dcscale")
    (folder / "copy.safetensors").write_bytes(b"corrupt!")
    with pytest.raises(ConversionError, match="copy.safetensors cannot be read as safetensors"):
        prepare(folder, "dcscale")


def test_folders_that_are_not_models(tmp_path):
    with pytest.raises(ConversionError, match="gone is not a folder"):
        prepare(tmp_path / "gone", "dcscale")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConversionError, match=r"looked for COMPLETE .*, checkpoints/step-X+ .*manifest.ocdbt.*config.json"
    ):
        prepare(tmp_path / "empty", "dcscale")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="config.json cannot be read"):
        prepare(tmp_path / "empty", "dcscale")
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(ConversionError, match="COMPLETE is missing: the checkpoint was not finished"):
        prepare(tmp_path / "step-00000001", "dcscale")


def test_corrupt_checkpoints(tmp_path):
    source = write_checkpoint(tmp_path / "model", tiny_config())
    state = (source / "state.json").read_text()
    other = state.replace('"spec"', '"spek"')
    (source / "state.json").write_text(other)
    seal(source)
    with pytest.raises(ConversionError, match="has a tokenizer without spec and eos_id"):
        prepare(source, "upstream")
    (source / "state.json").write_text(state.replace('"format": 1', '"format": 9'))
    seal(source)
    with pytest.raises(ConversionError, match="format 9, this version of dcscale reads 1"):
        prepare(source, "upstream")
    (source / "state.json").write_text(state)
    seal(source)
    config = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(config.replace("layers: 2", "layers: 3"))
    seal(source)
    marker = json.loads((source / "COMPLETE").read_text())
    with pytest.raises(ConversionError, match=r"blocks.2.attention.q.weight is missing"):
        prepare(source, "dcscale")
    marker["files"]["config.yaml"]["bytes"] += 1
    (source / "COMPLETE").write_text(json.dumps(marker))
    with pytest.raises(ConversionError, match="config.yaml has .* bytes, .* were written"):
        prepare(source, "dcscale")


def test_options_that_cannot_be_combined(tmp_path, upstream_of):
    with pytest.raises(ConversionError, match="already has the format upstream: convert it to dcscale"):
        prepare(upstream_of().folder, "upstream")
    source = write_checkpoint(tmp_path / "model", tiny_config())
    with pytest.raises(
        ConversionError, match="--gelu, --local-keys: only for upstream models, but the source is a dcscale"
    ):
        prepare(source, "upstream", gelu="erf", local_keys=3)
    folder = upstream_of(windows=[None])
    with pytest.raises(ConversionError, match="window_size is null"):
        prepare(folder.folder, "dcscale", local_keys=3)
    with pytest.raises(ConversionError, match=r"model.windows\[0\] = 0"):
        prepare(upstream_of().folder, "dcscale", local_keys=0)
