"""dcscale -> upstream -> dcscale, for every kind of model that upstream has, and which of its copies are used."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from dcscale.checkpoint.layout import read_config, read_state
from dcscale.config.schema import ComposeConfig
from dcscale.convert import ConversionError, conversion, convert, prepare
from dcscale.models import DCFormer
from dcscale.testing.models import UpstreamFolder, load_tensors, random_ids, tensors_of, tiny_config, write_checkpoint

PYTHIA = {"norm": "layernorm", "ffn": "gelu", "windows": [6, None]}
MODELS = {
    "dcformer": {},
    "multi_gate": {"multi_gate": 6, "qk_norm": False, "rope_base": 5e5},
    "jax": {"qk_norm_eps": 1e-5, "compose": ComposeConfig(gelu="tanh", gate_init=0.05)},
    "erf": {"compose": ComposeConfig(gelu="erf")},
    "twin": {"attention": "mha"},
    "twin tied": {"attention": "mha", "tied_embeddings": True},
    "tied": {"tied_embeddings": True},
    "query-wise": {"compose": ComposeConfig(key_wise=False)},
    "pre gates": {"compose": ComposeConfig(post=False, low_rank=False)},
    "post low-rank": {"compose": ComposeConfig(pre=False, gates=False)},
    "global": {"windows": [None]},
    "LGLL": {"windows": [256, None, 256, 256], "layers": 4},
    "LGL6": {"windows": [256, None, *6 * [256]], "layers": 8},
    "pythia": {**PYTHIA, "bias": True, "parallel_residual": True, "rope_fraction": 0.25},
    "pythia sequential": {**PYTHIA, "rope_fraction": 0.5},
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(name, tmp_path):
    model = tiny_config(**MODELS[name])
    source = write_checkpoint(tmp_path / "step-00000007", model, training=True, shard_bytes=1 << 14)
    convert(source, tmp_path / "exported", "upstream")
    convert(tmp_path / "exported", tmp_path / "again", "dcscale")
    before, after = tensors_of(source), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_config(tmp_path / "again").model == model
    assert read_state(tmp_path / "again")["tokenizer"] == {"spec": "byte", "eos_id": 256}


@pytest.mark.parametrize("name", ["query-wise", "pre gates", "post low-rank", "twin"])
def test_what_is_off_composes_with_the_identity_in_upstream(name, tmp_path):
    """Upstream's code always composes, so using all of its tensors must give the same logits."""
    model = tiny_config(**MODELS[name])
    source = write_checkpoint(tmp_path / "model", model)
    folder = UpstreamFolder(convert_to(source, tmp_path / "exported", "upstream"))
    folder.settings |= {"use_dcmha": True}
    del folder.settings["dcscale"]
    convert(folder.write(), tmp_path / "whole", "dcscale")
    whole = read_config(tmp_path / "whole").model
    assert whole.attention == "dcmha"
    assert whole.compose == ComposeConfig()
    assert logits(tmp_path / "whole", whole) == pytest.approx(logits(source, model), abs=1e-5)


def convert_to(source, target, kind):
    convert(source, target, kind)
    return target


def logits(folder, config):
    model = DCFormer(config)
    load_tensors(model, folder)
    with torch.no_grad():
        return model(random_ids(config, 1, 12)).flatten().numpy()


def test_a_model_folder_is_the_checkpoint_without_its_optimizer(tmp_path):
    source = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007", tiny_config(), training=True)
    done = convert(tmp_path / "run", tmp_path / "models" / "mine", "dcscale")
    assert done.source.description == f"dcscale training checkpoint {source}"
    same = tensors_of(tmp_path / "models" / "mine")
    assert all(torch.equal(same[key], tensor) for key, tensor in tensors_of(source).items())
    state = read_state(tmp_path / "models" / "mine")
    assert state == {"format": 1, "step": 7, "tokens": 700, "tokenizer": {"spec": "byte", "eos_id": 256}}
    done = convert(tmp_path / "models" / "mine", tmp_path / "half", "dcscale", dtype="bf16")
    assert done.source.description == f"dcscale model folder {tmp_path / 'models' / 'mine'}"
    half = tensors_of(tmp_path / "half")
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in same.items())
    assert read_config(tmp_path / "half").train.precision == "bf16"
    assert read_config(tmp_path / "half").model == read_config(source).model


def test_types_of_upstream_folders(tmp_path, upstream_of):
    folder = upstream_of()
    assert folder.settings["torch_dtype"] == "float32"
    convert(folder.folder, tmp_path / "half", "dcscale", dtype="bf16")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}
    convert(tmp_path / "half", tmp_path / "exported", "upstream")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "exported").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    folder.tensors["norm.weight"] = folder.tensors["norm.weight"].double()
    convert(folder.write(), tmp_path / "mixed", "dcscale")
    assert tensors_of(tmp_path / "mixed")["norm.weight"].dtype == torch.float64
    convert(tmp_path / "mixed", tmp_path / "widest", "upstream")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "widest").values()} == {torch.float64}


def of_kind(folder, *kinds):
    return [name for name in folder.tensors if name.endswith(tuple(f".dyn_w_proj.{kind}" for kind in kinds))]


def change(folder, what, *kinds):
    generator = torch.Generator().manual_seed(1)
    for name in of_kind(folder, *kinds):
        tensor = folder.tensors[name]
        noise = torch.randn(tensor.shape, generator=generator)
        folder.tensors[name] = {
            "trained": tensor + 0.5 * tensor.std() * noise,
            "unused": noise,
            "zero": torch.zeros_like(tensor),
        }[what]


@pytest.mark.parametrize(
    ("what", "kinds", "source", "note", "gelu", "window"),
    [
        ("trained", ("dw_m", "qkw_m"), "dw_m", "trained from the originals: by upstream's PyTorch", "erf", 6),
        ("unused", ("dw_m", "qkw_m"), "dw1", "unused initial values or zero: converted from JAX", "tanh", 5),
        ("zero", ("dw_m",), "dw1", "unused initial values or zero: converted from JAX", "tanh", 5),
        ("zero", (), "dw1", "the merged copies equal the originals", "tanh", 5),
    ],
)
def test_the_copies_that_were_trained_are_used(what, kinds, source, note, gelu, window, tmp_path, upstream_of):
    folder = upstream_of()
    change(folder, what, *kinds)
    done = convert(folder.write(), tmp_path / "model", "dcscale")
    assert any(note in line for line in done.notes)
    trained = folder.tensors[f"layers.1.attention.dyn_w_proj.{source}"].flatten(1)[:, : 4 * 16]
    assert torch.equal(tensors_of(tmp_path / "model")["blocks.1.attention.compose.dw1"].flatten(1), trained)
    model = read_config(tmp_path / "model").model
    assert (model.compose.gelu, model.windows) == (gelu, [window, None])


def test_only_one_of_the_copies(tmp_path, upstream_of):
    folder, whole = upstream_of(), upstream_of()
    for name in of_kind(folder, "dw1", "dd", "qkw"):
        del folder.tensors[name]
    done = convert(folder.write(), tmp_path / "merged", "dcscale", gelu="tanh", local_keys=5)
    assert "only the merged copies exist" in done.notes[0]
    for name in of_kind(whole, "dw_m", "qkw_m"):
        del whole.tensors[name]
    done = convert(whole.write(), tmp_path / "original", "dcscale")
    assert "there are no merged copies" in done.notes[0]
    merged, original = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "original")
    assert all(torch.equal(merged[name], original[name]) for name in original)
    assert read_config(tmp_path / "merged").model == read_config(tmp_path / "original").model


@pytest.mark.parametrize("name", ["query-wise", "pre gates", "post low-rank"])
def test_only_the_merged_copies_of_a_part_of_compose(name, tmp_path, upstream_of):
    folder = upstream_of(**MODELS[name])
    convert(folder.folder, tmp_path / "original", "dcscale")
    for tensor in of_kind(folder, "dw1", "dd", "qkw"):
        del folder.tensors[tensor]
    convert(folder.write(), tmp_path / "merged", "dcscale")
    merged, original = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "original")
    assert merged.keys() == original.keys()
    assert all(torch.equal(merged[key], original[key]) for key in original)
    for tensor in of_kind(folder, "dw_m"):
        folder.tensors[tensor] += 1
    with pytest.raises(ConversionError, match="dw_m is not zero in parts of compose that are off"):
        convert(folder.write(), tmp_path / "trained", "dcscale")


def test_separate_q_k_v_as_older_upstream_files_have_them(tmp_path, upstream_of):
    folder = upstream_of(**MODELS["pythia"])
    convert(folder.folder, tmp_path / "together", "dcscale")
    for name in [name for name in folder.tensors if ".wqkv." in name]:
        for part, tensor in zip("qkv", folder.tensors.pop(name).chunk(3)):
            folder.tensors[name.replace("wqkv", f"w{part}")] = tensor.contiguous()
    convert(folder.write(), tmp_path / "apart", "dcscale")
    together, apart = tensors_of(tmp_path / "together"), tensors_of(tmp_path / "apart")
    assert all(torch.equal(apart[name], together[name]) for name in together)


def test_grouped_queries_are_read(tmp_path, upstream_of):
    folder = upstream_of()
    folder.settings["n_local_heads"] = 2
    for name in [name for name in folder.tensors if name.endswith("wqkv.weight")]:
        folder.tensors[name] = folder.tensors[name][:64].contiguous()
    convert(folder.write(), tmp_path / "model", "dcscale")
    wqkv = folder.tensors["layers.0.attention.wqkv.weight"]
    converted = tensors_of(tmp_path / "model")
    assert read_config(tmp_path / "model").model.kv_heads == 2
    for part, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        assert torch.equal(converted[f"blocks.0.attention.{part}.weight"], wqkv[rows])


def test_query_wise_drops_the_key_branches_with_a_note(tmp_path, upstream_of):
    folder = upstream_of()
    folder.settings["query_wise"] = True
    done = convert(folder.write(), tmp_path / "model", "dcscale")
    assert any("query_wise is set" in note for note in done.notes)
    dw1 = folder.tensors["layers.0.attention.dyn_w_proj.dw1"]
    converted = tensors_of(tmp_path / "model")["blocks.0.attention.compose.dw1"]
    assert torch.equal(converted, dw1[:, 0, [0, 2]])


def test_bin_files_in_one_and_in_parts(tmp_path, upstream_of):
    folder = upstream_of()
    convert(folder.folder, tmp_path / "safetensors", "dcscale")
    expected = tensors_of(tmp_path / "safetensors")
    (folder.folder / "model.safetensors").unlink()
    torch.save(folder.tensors, folder.folder / "pytorch_model.bin")
    convert(folder.folder, tmp_path / "one", "dcscale")
    (folder.folder / "pytorch_model.bin").unlink()
    names, index = sorted(folder.tensors), {}
    for number, part in enumerate((names[:9], names[9:])):
        torch.save({name: folder.tensors[name] for name in part}, folder.folder / f"part{number}.bin")
        index |= dict.fromkeys(part, f"part{number}.bin")
    (folder.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    convert(folder.folder, tmp_path / "parts", "dcscale")
    for result in ("one", "parts"):
        found = tensors_of(tmp_path / result)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shared_tensors_are_listed_and_kept(tmp_path, upstream_of):
    folder = upstream_of(tied_embeddings=True)
    (folder.folder / "model.safetensors").unlink()
    folder.tensors["output.weight"] = folder.tensors["tok_embeddings.weight"]
    torch.save(folder.tensors, folder.folder / "pytorch_model.bin")
    done = convert(folder.folder, tmp_path / "tied", "dcscale")
    assert any("shared in the file, written separately: " in line for line in done.lines())
    assert "output.weight" not in tensors_of(tmp_path / "tied")
    folder.settings["tie_word_embeddings"] = False
    (folder.folder / "config.json").write_text(json.dumps(folder.settings))
    convert(folder.folder, tmp_path / "untied", "dcscale")
    untied = tensors_of(tmp_path / "untied")
    assert torch.equal(untied["output.weight"], untied["embedding.weight"])


def test_an_output_that_is_not_the_embedding_is_not_tied(tmp_path, upstream_of):
    folder = upstream_of()
    folder.settings["tie_word_embeddings"] = True
    done = convert(folder.write(), tmp_path / "model", "dcscale")
    assert any("output.weight differs from the embedding" in note for note in done.notes)
    assert not read_config(tmp_path / "model").model.tied_embeddings


def test_shards_of_the_result(tmp_path):
    source = write_checkpoint(tmp_path / "model", tiny_config())
    prepare(source, "upstream").write(tmp_path / "exported", shard_bytes=1 << 14)
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 3
    convert(tmp_path / "exported", tmp_path / "again", "dcscale")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(source).keys()


@pytest.mark.parametrize("target", ["upstream", "dcscale"])
def test_only_one_tensor_is_in_memory(target, tmp_path, monkeypatch, upstream_of):
    source = write_checkpoint(tmp_path / "model", tiny_config()) if target == "upstream" else upstream_of().folder
    alive = []

    def hold_none(weights, *_):
        made = []
        for _name, tensor in weights:
            made.append(weakref.ref(tensor))
            del tensor
            alive.append(sum(reference() is not None for reference in made))

    monkeypatch.setattr(conversion, "save_weights", hold_none)
    convert(source, tmp_path / "result", target)
    assert len(alive) > 20
    assert max(alive) == 1


def test_the_source_is_not_changed(tmp_path, upstream_of):
    folder = upstream_of()
    convert(folder.folder, tmp_path / "model", "dcscale")
    now = load_file(folder.folder / "model.safetensors")
    assert all(torch.equal(now[name], tensor) for name, tensor in folder.tensors.items())
    assert read_config(tmp_path / "model").model == tiny_config()
