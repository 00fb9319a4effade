"""Plain Transformers of the transformers library become DCFormers with the same logits, whose compose can learn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dcscale.checkpoint import find_checkpoint
from dcscale.checkpoint.layout import read_config, read_state
from dcscale.config.schema import RopeScalingConfig
from dcscale.convert import ConversionError, convert, prepare
from dcscale.convert.formats import transformers as plain
from dcscale.convert.settings import check_known
from dcscale.models import DCFormer
from dcscale.ops import rope_table
from dcscale.testing.models import load_tensors, tensors_of

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
SOURCES = {
    "llama": ("llama", {**GROUPED, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 300.0}}),
    "llama3": ("llama", {**GROUPED, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "linear": ("llama", {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "wide heads": ("llama", {**GROUPED, "head_dim": 12, "tie_word_embeddings": True}),
    "biases": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "attention biases": ("llama", {**GROUPED, "attention_bias": True}),
    "qwen2": ("qwen2", {**GROUPED, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2 sliding": ("qwen2", {**GROUPED, **SLIDING, "tie_word_embeddings": True, "head_dim": 12}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "qwen3 sliding": ("qwen3", {**GROUPED, **SLIDING, "head_dim": 8, "attention_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 5}),
    "mistral full": ("mistral", {**GROUPED, "sliding_window": None, "head_dim": 10}),
    "pythia": ("gpt_neox", {**SIZES, "layer_norm_eps": 1e-3}),
    "neox sequential": (
        "gpt_neox",
        {
            **SIZES,
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 200.0, "partial_rotary_factor": 0.5},
        },
    ),
    "neox without biases": ("gpt_neox", {**SIZES, "attention_bias": False, "tie_word_embeddings": True}),
}


@torch.no_grad()
def random_source(name):
    """A source far from its initialisation: a wrong mask, layout or bias changes its logits."""
    family, settings = SOURCES[name]
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        else:
            parameter.copy_(
                torch.randn(parameter.shape) * (1 if parameter.shape[0] == 61 else parameter.shape[1] ** -0.5)
            )
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Saves a source, once; its folder and logits."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def make(name):
        if name not in made:
            model, folder = random_source(name), root / name.replace(" ", "-")
            model.save_pretrained(folder)
            with torch.no_grad():
                made[name] = folder, model(IDS).logits
        return made[name]

    return make


IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))


def model_of(folder):
    model = DCFormer(read_config(folder).model)
    load_tensors(model, folder)
    return model


@torch.no_grad()
def logits_of(folder):
    return model_of(folder)(IDS)


@pytest.mark.parametrize("name", SOURCES)
def test_the_logits_are_those_of_the_source(name, tmp_path, source):
    folder, logits = source(name)
    done = convert(folder, tmp_path / "model", "dcscale")
    assert logits.std() > 0.5
    torch.testing.assert_close(logits_of(tmp_path / "model"), logits, atol=2e-5, rtol=0)
    model = read_config(find_checkpoint(tmp_path / "model")).model
    assert model.attention == "dcmha"
    assert "compose starts as the identity" in done.notes
    twin = convert(folder, tmp_path / "twin", "dcscale", model=["attention=mha"])
    torch.testing.assert_close(logits_of(tmp_path / "twin"), logits, atol=2e-5, rtol=0)
    assert not [rule for rule in twin.plan.rules if ".compose." in rule.name]
    with torch.no_grad():
        composed, plain = (model_of(tmp_path / kind).double()(IDS) for kind in ("model", "twin"))
    torch.testing.assert_close(composed, plain, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_logits_differ_only_by_rounding(tmp_path, source, monkeypatch):
    """In float64, with the same RoPE table and a float64 softmax: transformers computes both in float32."""
    convert(source("pythia")[0], tmp_path / "model", "dcscale")
    model, original = model_of(tmp_path / "model").double(), random_source("pythia").double()
    original.set_attn_implementation("sdpa")
    cos, sin = (torch.cat([part, part], dim=-1)[None].double() for part in rope_table(IDS.shape[1], 2, 10000.0))
    monkeypatch.setattr(original.gpt_neox.rotary_emb, "forward", lambda *_, **__: (cos, sin))
    torch.testing.assert_close(model(IDS), original(IDS).logits, atol=1e-9, rtol=0)


def test_what_the_settings_become(tmp_path, source):
    def model(name):
        if not (tmp_path / name).exists():
            convert(source(name)[0], tmp_path / name, "dcscale")
        return read_config(tmp_path / name).model

    assert (model("llama").kv_heads, model("llama").head_dim, model("llama").norm_eps) == (2, None, 1e-3)
    assert model("llama3").rope_scaling == RopeScalingConfig("llama3", 4.0, 1.0, 4.0, 16)
    assert model("linear").rope_scaling == RopeScalingConfig("linear", 2.0)
    assert (model("wide heads").head_dim, model("wide heads").tied_embeddings) == (12, True)
    assert (model("qwen2").bias, model("qwen2").qkv_bias, model("qwen2").windows) == (False, True, [None])
    assert (model("attention biases").bias, model("attention biases").qkv_bias) == (True, False)
    assert model("qwen2 sliding").windows == [None, 5, 5]
    assert model("mistral").windows == [5]
    assert (model("qwen3").qk_norm, model("qwen3").qk_norm_eps) == (True, 1e-3)
    assert (model("pythia").rope_fraction, model("pythia").parallel_residual) == (0.25, True)
    assert not model("neox sequential").parallel_residual
    assert not [name for name in tensors_of(tmp_path / "qwen2") if name.endswith("out.bias")]


def test_every_compose_tensor_learns(tmp_path, source):
    """At the identity dw1 and the half of qkw that makes w1 have no gradient: they get one as soon as w2 moves."""
    convert(source("llama")[0], tmp_path / "model", "dcscale")
    model = model_of(tmp_path / "model")
    compose = {name: p for name, p in model.named_parameters() if ".compose." in name}
    assert len(compose) == 9
    before = {name: p.detach().clone() for name, p in compose.items()}
    targets = torch.cat([IDS[:, 1:], torch.full_like(IDS[:, :1], -100)], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []

    def moved(change):
        rank = model.config.compose.rank
        parts = {"dd": change["dd"], "dw1": change["dw1"]}
        parts |= {"w1": change["qkw"][:, :, :rank], "w2": change["qkw"][:, :, rank:]}
        return {name for name, part in parts.items() if part.any()}

    for step in range(3):
        optimizer.zero_grad()
        loss = model(IDS, targets) / (targets >= 0).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer in range(3):
            prefix = f"blocks.{layer}.attention.compose."
            change = {kind: compose[prefix + kind] - before[prefix + kind] for kind in ("dd", "dw1", "qkw")}
            assert moved(change) == ({"dd", "w2"} if step == 0 else {"dd", "dw1", "w1", "w2"})
    assert losses == sorted(losses, reverse=True)


def test_the_seed_determines_the_new_weights(tmp_path, source):
    folder, logits = source("mistral")
    for name, seed in (("a", None), ("b", 0), ("c", 1)):
        convert(folder, tmp_path / name, "dcscale", seed=seed)
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name for name in a if not torch.equal(a[name], c[name])} == {
        f"blocks.{layer}.attention.compose.{kind}" for layer in range(3) for kind in ("dw1", "qkw")
    }
    torch.testing.assert_close(logits_of(tmp_path / "c"), logits, atol=2e-5, rtol=0)


def test_settings_that_the_user_chooses(tmp_path, source):
    folder, logits = source("pythia")
    chosen = ["compose.rank=1", "compose.key_wise=false", "compose.gates=false", "backend=reference"]
    convert(folder, tmp_path / "model", "dcscale", model=chosen)
    model = read_config(tmp_path / "model").model
    assert (model.compose.rank, model.compose.key_wise, model.compose.gates, model.backend) == (1, 0, 0, "reference")
    assert tensors_of(tmp_path / "model")["blocks.0.attention.compose.qkw"].shape == (2, 8, 2, 4)
    torch.testing.assert_close(logits_of(tmp_path / "model"), logits, atol=2e-5, rtol=0)
    done = convert(folder, tmp_path / "windows", "dcscale", model=["windows=[8,null]"])
    assert read_config(tmp_path / "windows").model.windows == [8, None]
    assert "windows are [8, None] as requested, the source has [None]" in done.notes[-2]
    torch.testing.assert_close(logits_of(tmp_path / "windows")[:, :8], logits[:, :8], atol=2e-5, rtol=0)
    assert (logits_of(tmp_path / "windows") - logits).abs().max() > 0.1


class Folder:
    """A copy of a source whose config and tensors may be changed."""

    def __init__(self, source, folder):
        self.folder = folder
        self.settings = json.loads((source / "config.json").read_text())
        self.tensors = load_file(source / "model.safetensors")
        folder.mkdir()

    def write(self):
        (self.folder / "config.json").write_text(json.dumps(self.settings))
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.folder


@pytest.fixture
def changed(tmp_path, source):
    return lambda name: Folder(source(name)[0], tmp_path / f"changed-{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize("name", ["llama", "llama3", "linear", "pythia"])
def test_rope_as_version_4_of_transformers_writes_it(name, tmp_path, source, changed):
    folder = changed(name)
    rope = folder.settings.pop("rope_parameters")
    kind = rope.pop("rope_type")
    if name == "pythia":
        folder.settings |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    else:
        folder.settings["rope_theta"] = rope.pop("rope_theta")
        # The key was called type at first.
        folder.settings["rope_scaling"] = {"type" if kind == "linear" else "rope_type": kind, **rope} if rope else None
    convert(folder.write(), tmp_path / "model", "dcscale")
    torch.testing.assert_close(logits_of(tmp_path / "model"), source(name)[1], atol=2e-5, rtol=0)


def test_sharded_safetensors(tmp_path, source):
    random_source("qwen3").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    convert(tmp_path / "sharded", tmp_path / "model", "dcscale")
    torch.testing.assert_close(logits_of(tmp_path / "model"), source("qwen3")[1], atol=2e-5, rtol=0)


def test_files_of_old_versions(tmp_path, source, changed):
    """Several .bin files with masks and RoPE tables, and a tied matrix under both names."""
    folder = changed("pythia")
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention."
        folder.tensors[prefix + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        folder.tensors[prefix + "masked_bias"] = torch.tensor(-1e9)
        folder.tensors[prefix + "rotary_emb.inv_freq"] = torch.ones(1)
    folder.tensors["lm_head.weight"] = folder.tensors.pop("embed_out.weight")  # version 5's name
    folder.write()
    (folder.folder / "model.safetensors").unlink()
    names, files = sorted(folder.tensors), ("a.bin", "b.bin")
    for file, part in zip(files, (names[::2], names[1::2])):
        torch.save({name: folder.tensors[name] for name in part}, folder.folder / file)
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder.folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    done = convert(folder.folder, tmp_path / "model", "dcscale")
    torch.testing.assert_close(logits_of(tmp_path / "model"), source("pythia")[1], atol=2e-5, rtol=0)
    assert "dropped: gpt_neox.layers.*.attention.bias  (a mask or a table of RoPE)  x 3" in done.lines()

    tied, logits = changed("wide heads"), source("wide heads")[1]
    tied.tensors["lm_head.weight"] = tied.tensors["model.embed_tokens.weight"].clone()
    convert(tied.write(), tmp_path / "tied", "dcscale")
    assert "output.weight" not in tensors_of(tmp_path / "tied")
    torch.testing.assert_close(logits_of(tmp_path / "tied"), logits, atol=2e-5, rtol=0)
    tied.tensors["lm_head.weight"] += 1
    done = convert(tied.write(), tmp_path / "untied", "dcscale")
    assert "lm_head.weight differs from the embedding: they are not tied here" in done.notes[0]
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tied.folder, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path / "untied"), reloaded(IDS).logits, atol=2e-4, rtol=1e-5)


def test_types_and_the_tokenizer(tmp_path, changed):
    folder = changed("llama3")
    folder.tensors = {name: tensor.bfloat16() for name, tensor in folder.tensors.items()}
    folder.settings["eos_token_id"] = [3, 4]
    (folder.folder / "tokenizer.json").write_text("{}")
    convert(folder.write(), tmp_path / "model", "dcscale")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "model").values()} == {torch.bfloat16}
    assert read_config(tmp_path / "model").train.precision == "bf16"
    assert read_state(tmp_path / "model")["tokenizer"] == {"spec": "tokenizer.json", "eos_id": 3}
    folder.settings["eos_token_id"] = -1
    convert(folder.write(), tmp_path / "wide", "dcscale", dtype="fp32")
    assert "tokenizer" not in read_state(tmp_path / "wide")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "wide").values()} == {torch.float32}
    assert read_config(tmp_path / "wide").train.precision == "fp32"


def test_the_tool_prints_the_mapping_and_uses_the_options(tmp_path, call, source):
    folder = source("pythia")[0]
    arguments = ["--seed", "5", "--model", "compose.rank=1", "compose.post=false", "--model", "windows=[16,null]"]
    code, output, _ = call(folder, tmp_path / "model", "--to", "dcscale", *arguments)
    assert code == 0
    for line in (
        f"{folder} is: GPT-NeoX folder {folder}, of transformers",
        "note: compose starts as the identity",
        "blocks.*.attention.compose.dw1  <-  created here  (new, seed 5)  x 3",
        "blocks.*.attention.compose.dd  <-  created here  (zero: gates are 0)  x 3",
    ):
        assert f"{line}\n" in output
    assert "blocks.*.attention.k.weight  <-  gpt_neox.layers.*.attention.query_key_value.weight" in output
    model = read_config(tmp_path / "model").model
    assert (model.compose.rank, model.compose.post, model.windows) == (1, False, [16, None])
    code, _, output = call(folder, tmp_path / "other", "--to", "dcscale", "--model", "layers=2")
    assert code == 2
    assert (
        "error: --model layers=2: only attention, backend, scratch_mib, windows and compose.* may be chosen" in output
    )


def test_the_config_has_only_known_settings(tmp_path, source):
    """So that it can be the first config file of a run, before those of its training."""
    convert(source("llama")[0], tmp_path / "model", "dcscale")
    lines = (tmp_path / "model" / "config.yaml").read_text().splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["model:", "data:", "train:"]
    assert [line for line in lines if line.startswith("  ")][-2:] == ["  sequence_length: 64", "  precision: fp32"]


@pytest.mark.parametrize("family", plain.FAMILIES)
def test_every_setting_of_transformers_is_known(family):
    """A setting that a later version of transformers adds must be read, or listed as irrelevant for the logits."""
    check_known(transformers.AutoConfig.for_model(family).to_dict(), plain._KNOWN[family])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", {"rope_base": 10000.0}),
        ("llama", {"norm_eps": 1e-6}),
        ("llama3", {"rope_scaling": RopeScalingConfig()}),
        ("llama3", {"rope_scaling": RopeScalingConfig("linear", 4.0)}),
        ("linear", {"rope_scaling": RopeScalingConfig()}),
        ("qwen2 sliding", {"windows": [None, 6, 6]}),
        ("qwen3", {"qk_norm_eps": 1e-6}),
        ("mistral", {"windows": [4]}),
        ("pythia", {"rope_fraction": 0.5}),
        ("pythia", {"parallel_residual": False}),
    ],
)
def test_wrong_settings_change_the_logits(name, wrong, tmp_path, source):
    convert(source(name)[0], tmp_path / "model", "dcscale")
    model = DCFormer(replace(read_config(tmp_path / "model").model, **wrong))
    load_tensors(model, tmp_path / "model")
    with torch.no_grad():
        assert (model(IDS) - source(name)[1]).abs().max() > 1e-3


REFUSED = {
    "llama": [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', but dcscale's swiglu only has 'silu' or 'swish'"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', but must be an integer of at least 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but .* has only 30 tensors"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None, but must be an integer of at least 1"),
        ({"attention_bias": 1}, "attention_bias is 1, but must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set: quantized weights cannot be read"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "of type 'yarn': dcscale only has default, linear, llama3"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling is {'type': .* only the same RoPE for all layers"),
        ({"rope_scaling": {"type": 3}}, "its RoPE is of type 3"),
        ({"rope_scaling": {"type": "linear"}}, "its RoPE of type 'linear' has no factor"),
        (
            {"rope_parameters": {"rope_theta": 300.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling are both set, and differ",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of type 'llama3' has no low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "model.rope_scaling.factor = 0.5: must be at least 1"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters is .*: only the same RoPE for all layers"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5: .* rotates all dimensions of a head",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7}}, "does not know: mscale=0.7"),
        ({"rope_scaling": {"rope_type": "default", "beta_fast": 32}}, "RoPE has settings that .*: beta_fast=32"),
        ({"rope_parameters": {"rope_theta": "big"}}, "model.rope_base = .*: must be float"),
        ({"original_max_position_embeddings": 32}, "original_max_position_embeddings is set outside rope_parameters"),
        ({"num_key_value_heads": 3}, "model.kv_heads = 3"),
        ({"rms_norm_eps": -1.0}, "model.norm_eps = -1.0"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ],
    "qwen2": [
        (
            {"layer_types": ["full_attention"]},
            "layer_types is .*, but must list full_attention or sliding_attention for",
        ),
        ({"layer_types": 3 * ["chunked_attention"]}, "layer_types is .* for each of 3 layers"),
        ({"layer_types": 3 * ["sliding_attention"]}, "layer_types is .*, but use_sliding_window is false"),
        (
            {"layer_types": 3 * ["sliding_attention"], "use_sliding_window": True, "sliding_window": None},
            "sliding_window is None, but layers need it",
        ),
        (
            {**SLIDING, "layer_types": None, "max_window_layers": "1"},
            "max_window_layers is '1', but must be an integer",
        ),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes', but must be true or false"),
    ],
    "mistral": [
        ({"layer_types": ["full_attention", *2 * ["sliding_attention"]]}, "Mistral has the same window in every layer"),
        ({"sliding_window": 0}, "sliding_window is 0, but layers need it: it must be an integer of at least 1"),
    ],
    "pythia": [
        ({"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast', but dcscale's gelu only has 'gelu'"),
        ({"intermediate_size": 40}, r"mlp.dense_h_to_4h.weight has shape \[48, 32\], the config requires \[40, 32\]"),
    ],
}


@pytest.mark.parametrize(
    ("name", "changes", "message"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_settings_that_are_refused(name, changes, message, changed):
    folder = changed(name)
    if "rope_scaling" in changes:  # of version 4, which has no rope_parameters
        del folder.settings["rope_parameters"]
    folder.settings |= changes
    with pytest.raises(ConversionError, match=message):
        prepare(folder.write(), "dcscale")


def test_notes_on_settings(changed):
    folder = changed("pythia")
    folder.settings |= {"hidden_dropout": 0.1, "auto_map": {"AutoModel": "other.Model"}}
    notes = prepare(folder.write(), "dcscale").notes
    assert "dcscale has no dropout: hidden_dropout=0.1 is ignored" in notes
    assert "auto_map names code of its own, which is not run" in "\n".join(notes)
    folder = changed("attention biases")
    assert "biases of ffn, which the source does not have, start at zero" in prepare(folder.write(), "dcscale").notes


def test_tensors_that_are_refused(tmp_path, changed):
    folder = changed("llama")
    del folder.tensors["model.norm.weight"]
    folder.tensors |= {"model.layers.3.input_layernorm.weight": torch.ones(32), "lm_head.weight": torch.ones(61, 31)}
    folder.tensors["model.embed_tokens.weight"] = torch.ones(61, 32, dtype=torch.int8)
    with pytest.raises(ConversionError) as error:
        prepare(folder.write(), "dcscale")
    for part in (
        "model.norm.weight is missing",
        "model.layers.3.input_layernorm.weight [32] is not part of the model",
        "lm_head.weight has shape [61, 31], the config requires [61, 32]",
        "model.embed_tokens.weight is torch.int8: weights must be floating point",
    ):
        assert part in str(error.value)
    folder = changed("qwen2")
    folder.tensors["model.layers.1.self_attn.k_proj.bias"][3] = torch.nan
    with pytest.raises(ConversionError, match="attention.k.bias  <-  .*k_proj.bias: 1 NaN and 0 infinite of 16"):
        convert(folder.write(), tmp_path / "model", "dcscale")
    assert not (tmp_path / "model").exists()


def test_options_that_are_refused(tmp_path, source, changed):
    folder = source("llama")[0]
    with pytest.raises(
        ConversionError, match=r"--model dim=16, heads=2: only attention, .*, windows and compose.\* may"
    ):
        prepare(folder, "dcscale", model=["dim=16", "heads=2"])
    with pytest.raises(ConversionError, match="model.compose.rank = 9"):
        prepare(folder, "dcscale", model=["compose.rank=9"])
    with pytest.raises(ConversionError, match="is not of the form key=value"):
        prepare(folder, "dcscale", model=["windows"])
    with pytest.raises(ConversionError, match="cannot be converted to upstream directly: convert it to dcscale first"):
        prepare(folder, "upstream")
    with pytest.raises(ConversionError, match="--from-copies: only for upstream models, but the source is a Llama"):
        prepare(folder, "dcscale", from_copies="merged")
    convert(folder, tmp_path / "model", "dcscale")
    with pytest.raises(
        ConversionError, match="--seed, --model: only for transformers and gguf models, but the source is a dcscale"
    ):
        prepare(tmp_path / "model", "dcscale", seed=0, model=["attention=mha"])
    with pytest.raises(ConversionError, match="upstream cannot represent this model: .*model.kv_heads is 2"):
        prepare(tmp_path / "model", "upstream")
    for name, part in (("qwen2", "model.qkv_bias is True"), ("linear", "model.rope_scaling.kind is 'linear'")):
        convert(source(name)[0], tmp_path / name, "dcscale")
        with pytest.raises(ConversionError, match=part):
            prepare(tmp_path / name, "upstream")
