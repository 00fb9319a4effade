"""GGUF files become DCFormers with the logits of the model that was written, and hostile files are refused."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import transformers

from dcscale.checkpoint.layout import read_config, read_state
from dcscale.config.schema import RopeScalingConfig
from dcscale.convert import ConversionError, convert, prepare
from dcscale.data import DataError, load_tokenizer
from dcscale.evaluation.loading import open_trained
from dcscale.models import DCFormer
from dcscale.testing.models import load_tensors

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
SOURCES = {
    "llama": ("llama", {"rope_parameters": {"rope_theta": 300.0}}, "F32"),
    "llama of biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "F16"),
    "llama of wide heads": ("llama", {"head_dim": 12}, "BF16"),
    "llama of 8 bits": ("llama", {}, "Q8_0"),
    "llama of 4 bits": ("llama", {}, "Q4_0"),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, "F32"),
    "linear": ("llama", {"rope_parameters": LINEAR}, "F32"),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6}}, "F32"),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "F32"),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))


class File:
    """What becomes a GGUF file: metadata as (value, type), and tensors as (array, type)."""

    def __init__(self, path, architecture, metadata, tensors):
        self.path, self.architecture, self.metadata, self.tensors = path, architecture, metadata, tensors

    def write(self):
        writer = gguf.GGUFWriter(self.path, self.architecture)
        for key, value in self.metadata.items():
            kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
        for name, (values, kind) in self.tensors.items():
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path


def interleaved(rows, heads):
    """As llama.cpp's converter permutes q and k of the architecture llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(scaling, base, dim):
    """As llama.cpp's converter computes rope_freqs."""
    length, factors = scaling["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        part = (length / wavelength - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        part = min(1.0, max(0.0, part))
        factors.append(1 / ((1 - part) / scaling["factor"] + part))
    return np.array(factors, np.float32)


@torch.no_grad()
def make(name, path):
    """A random model as a GGUF file, and its logits."""
    architecture, settings, kind = SOURCES[name]
    config = transformers.AutoConfig.for_model(architecture, **SIZES, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    s, rope = config.to_dict(), config.rope_parameters
    prefix = f"{architecture}."
    metadata = {
        "block_count": s["num_hidden_layers"],
        "context_length": s["max_position_embeddings"],
        "embedding_length": s["hidden_size"],
        "feed_forward_length": s["intermediate_size"],
        "attention.head_count": s["num_attention_heads"],
        "attention.head_count_kv": s["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": s["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    head_dim = s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"]
    metadata |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    tensors = {}
    if rope["rope_type"] == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(rope, rope["rope_theta"], head_dim), "F32"
    for parameter_name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else 1 if parameter.shape[0] == 61 else parameter.shape[1] ** -0.5
        parameter.copy_((1 if parameter_name.endswith("norm.weight") else 0) + spread * torch.randn(parameter.shape))
        values, this = parameter.numpy().copy(), "F32" if parameter.dim() == 1 else kind
        this_kind = gguf.GGMLQuantizationType[this]
        parameter.copy_(torch.tensor(gguf.dequantize(gguf.quantize(values, this_kind), this_kind).copy()))
        if architecture == "llama" and ("q_proj" in parameter_name or "k_proj" in parameter_name):
            heads = s["num_attention_heads"] if "q_proj" in parameter_name else s["num_key_value_heads"]
            values = interleaved(values, heads)
        for old, new in NAMES.items():
            parameter_name = parameter_name.replace(old, new)
        tensors[parameter_name] = values, this
    file = File(path, architecture, {prefix + key: value for key, value in metadata.items()}, tensors)
    return file, model(IDS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    results = {}

    def of(name):
        if name not in results:
            results[name] = make(name, tmp_path_factory.mktemp("gguf") / "model.gguf")
        return results[name]

    return of


@pytest.fixture
def changed(tmp_path, made):
    """A copy of a file that may be changed."""

    def copy(name="llama"):
        file = made(name)[0]
        return File(tmp_path / "changed.gguf", file.architecture, dict(file.metadata), dict(file.tensors))

    return copy


def logits_of(folder):
    model = DCFormer(read_config(folder).model)
    load_tensors(model, folder)
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("name", SOURCES)
def test_the_logits_are_those_of_the_model_in_the_file(name, tmp_path, made):
    file, logits = made(name)
    done = convert(file.write(), tmp_path / "model", "dcscale", seed=3)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits_of(tmp_path / "model"), logits, atol=3e-5, rtol=0)
    assert done.source.description == f"GGUF file {file.path}"
    assert "compose starts as the identity" in done.notes


def test_what_the_metadata_become(made):
    def model(name, **options):
        return prepare(made(name)[0].write(), "dcscale", **options).config.model

    llama = model("llama")
    assert (llama.kv_heads, llama.head_dim, llama.norm_eps, llama.rope_base) == (2, None, 1e-3, 300.0)
    assert (llama.tied_embeddings, llama.bias, llama.windows) == (False, False, [None])
    biased = model("llama of biases")
    assert (biased.bias, biased.tied_embeddings) == (True, True)
    assert model("llama3").rope_scaling == RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192)
    assert model("linear").rope_scaling == RopeScalingConfig("linear", 2.0)
    assert (model("qwen2").qkv_bias, model("qwen3").qk_norm, model("qwen3").head_dim) == (True, True, 16)
    assert model("llama", model=["attention=mha", "windows=[8]"]).attention == "mha"


def test_a_folder_with_one_file(tmp_path, made):
    file, logits = made("llama")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.GGUF").write_bytes(file.write().read_bytes())
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "source", tmp_path / "model", "dcscale")
    torch.testing.assert_close(logits_of(tmp_path / "model"), logits, atol=3e-5, rtol=0)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "source" / "b.gguf").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"source has 2 .gguf files: name one, such as .*a.GGUF"):
        prepare(tmp_path / "source", "dcscale")


TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 7,
    "tokenizer.chat_template": "{{ messages }}",
}


def test_the_tokenizer_of_the_metadata(tmp_path, changed):
    file = changed()
    file.metadata |= TOKENIZER
    done = convert(file.write(), tmp_path / "model", "dcscale")
    assert read_state(tmp_path / "model")["tokenizer"] == {"spec": "tokenizer.json", "eos_id": 2}
    for tokenizer in (load_tokenizer(tmp_path / "model"), open_trained(file.path).tokenizer):
        assert (tokenizer.encode("a ab"), tokenizer.eos_id) == ([6, 6, 5], 2)
    assert done.notes == ["compose starts as the identity", "its texts begin with the token 1: name it with --begin-id"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}  # no token has the id of pad
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text()) == names
    file.metadata["tokenizer.ggml.add_bos_token"] = False
    assert prepare(file.write(), "dcscale").notes == ["compose starts as the identity"]
    file.metadata["tokenizer.ggml.model"] = "bert"
    notes = prepare(file.write(), "dcscale").notes
    assert notes[1] == "its tokenizer is left out: its kind 'bert' is not known here"
    assert notes[2] == "no tokenizer.json with an eos_token_id: name a tokenizer for texts with --tokenizer"
    with pytest.raises(DataError, match="changed.gguf has no tokenizer.json: name one with --tokenizer"):
        _ = open_trained(file.path).tokenizer


def test_without_the_package(made, monkeypatch):
    path = made("llama")[0].write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match="model.gguf needs the gguf package: pip install gguf"):
        prepare(path, "dcscale")


def test_the_tool_converts_a_file(tmp_path, made, call):
    code, output, _ = call(made("llama")[0].write(), tmp_path / "model", "--to", "dcscale", "--dtype", "bf16")
    assert code == 0
    line = (
        "blocks.*.attention.k.weight  <-  blk.*.attn_k.weight  (the rows of each head are no longer interleaved)  x 2"
    )
    assert line in output
    (tmp_path / "empty.gguf").write_bytes(b"")
    code, _, output = call(tmp_path / "empty.gguf", tmp_path / "other", "--to", "dcscale")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "empty.gguf cannot be read as GGUF" in output
    with pytest.raises(ConversionError, match="--seed: only for transformers and gguf models, but the source is a dcs"):
        prepare(tmp_path / "model", "dcscale", seed=1)


METADATA = {
    "architecture": (
        {"general.architecture": "gemma3"},
        "has the architecture 'gemma3', but must have llama, qwen2, q",
    ),
    "adapter": ({"general.type": "adapter"}, "is a 'adapter', not a whole model"),
    "split": ({"split.count": 3}, "is one of 3 files: merge them with llama-gguf-split --merge"),
    "unknown": ({"llama.attention.sliding_window": 5}, "does not know: attention.sliding_window=5; remove from .*gguf"),
    "unknown prefix": ({"other.key": 5}, "does not know: other.key=5"),
    "experts": ({"llama.expert_count": 8}, "does not know: expert_count=8"),
    "not causal": ({"llama.attention.causal": False}, "does not know: attention.causal=False"),
    "missing": ({"llama.block_count": None}, "lacks llama.block_count"),
    "by layer": (
        {"llama.attention.head_count": [4, 4]},
        r"llama.attention.head_count is \[4, 4\], but must be one numb",
    ),
    "many layers": ({"llama.block_count": 10**9}, "num_hidden_layers is 1000000000, but .* has only 21 tensors"),
    "heads": ({"llama.attention.value_length": 4}, "has llama.attention.value_length 4, but heads of 8"),
    "part of RoPE": ({"llama.rope.dimension_count": 4}, "has llama.rope.dimension_count 4, but heads of 8"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "its RoPE is of type 'yarn'"),
    "linear without factor": ({"llama.rope.scaling.type": "linear"}, "model.rope_scaling.factor = null"),
    "another vocabulary": (
        {"llama.vocab_size": 60},
        r"token_embd.weight has shape \[61, 32\], the config requires \[60",
    ),
    "another width": ({"llama.feed_forward_length": 32}, r"ffn_down.weight has shape \[32, 64\], the config requires"),
    "zero": ({"llama.attention.head_count": 0}, "num_attention_heads is 0, but must be an integer of at least 1"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_are_refused(name, changed):
    changes, message = METADATA[name]
    file = changed()
    file.architecture = changes.pop("general.architecture", "llama") if "general.architecture" in changes else "llama"
    file.metadata = {key: value for key, value in {**file.metadata, **changes}.items() if value is not None}
    with pytest.raises(ConversionError, match=message):
        prepare(file.write(), "dcscale")


def test_metadata_that_do_not_matter(changed, made):
    file = changed()
    file.metadata |= {"general.name": "x", "quantize.imatrix.file": "y", "llama.expert_count": 0, "split.count": 1}
    file.metadata |= {"llama.tensor_data_layout": "Meta AI original pth", "llama.attention.causal": True}
    file.metadata |= {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0, "llama.vocab_size": 61}
    assert prepare(file.write(), "dcscale").config == prepare(made("llama")[0].write(), "dcscale").config
    del file.metadata["llama.rope.scaling.type"]  # llama.cpp's default is linear
    assert prepare(file.write(), "dcscale").config.model.rope_scaling == RopeScalingConfig("linear", 4.0)


def test_tensors_that_are_refused(changed):
    file = changed()
    file.tensors["rope_freqs.weight"] = np.array([1, 2, 3, 8], np.float32), "F32"
    with pytest.raises(
        ConversionError, match=r"has rope_freqs.weight \[4\] from 1 to 8: only the RoPE of Llama 3.1 to"
    ):
        prepare(file.write(), "dcscale")
    file = changed()
    file.tensors["blk.0.ffn_gate_exps.weight"] = np.ones((2, 4), np.float32), "F32"
    del file.tensors["output_norm.weight"]
    with pytest.raises(
        ConversionError, match=r"(?s)output_norm.weight is missing.*gate_exps.weight \[2, 4\] is not part"
    ):
        prepare(file.write(), "dcscale")
    del file.tensors["token_embd.weight"]
    with pytest.raises(ConversionError, match="has no matrix token_embd.weight"):
        prepare(file.write(), "dcscale")


def test_types_that_cannot_be_dequantized(changed):
    path = changed().write()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", np.ones((2, 4), np.int8))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(
        ConversionError, match="has 1 tensors of the type I8, such as a.weight, which the gguf package can"
    ):
        prepare(path, "dcscale")


def test_files_that_end_too_early(changed):
    path = changed().write()
    content = path.read_bytes()
    for size in [*range(0, 1200, 7), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ConversionError, match="changed.gguf cannot be read as GGUF: "):
            prepare(path, "dcscale")


@pytest.mark.parametrize("kind", ["UINT8", "STRING", "ARRAY"])
def test_arrays_of_any_length(kind, tmp_path):
    """The package would append elements for as long as the file says, far beyond its end."""
    header = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 1], "<u8").tobytes()
    kinds = np.array([gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind]], "<u4").tobytes()
    for length in (10**5, 2**63):
        key = np.array([1], "<u8").tobytes() + b"a" + kinds + np.array([length], "<u8").tobytes()
        (tmp_path / "a.gguf").write_bytes(header + key + b"\0" * 64)
        with pytest.raises(ConversionError, match="a.gguf cannot be read as GGUF: .*(too early|have arrays of 922)"):
            prepare(tmp_path / "a.gguf", "dcscale")


def test_files_of_the_other_byte_order(changed):
    file = changed()
    writer = gguf.GGUFWriter(file.path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a.weight", np.ones((2, 4), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(ConversionError, match="is for processors of the other byte order"):
        prepare(file.path, "dcscale")
