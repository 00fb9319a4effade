"""The folder for transformers: its files, its tokenizer, use without dcscale, and errors of the conversion."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, processors

from dcscale.checkpoint.layout import MARKER, seal
from dcscale.config.schema import ComposeConfig, RopeScalingConfig
from dcscale.convert import ConversionError, convert, prepare
from dcscale.convert.formats import modeling_dcscale
from dcscale.convert.formats.huggingface import FORMAT_VERSION
from dcscale.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from dcscale.testing.models import random_ids, random_model, tensors_of, tiny_config, write_checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_modules")

USE_WITHOUT_DCSCALE = """
import sys
sys.modules["dcscale"] = None  # so that importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["one text", "another one"], return_tensors="pt", padding=True)
print(model.generate(**inputs, max_new_tokens=5, do_sample=False).shape)
print(model.dtype)
model.save_pretrained(sys.argv[2])
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("dcscale.")]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    source = write_checkpoint(root / "run/checkpoints/step-00000007", tiny_config(vocab_size=257), training=True)
    prepare(root / "run", "huggingface").write(root / "exported", shard_bytes=1 << 14)
    return source, root / "exported"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "given")


def change(path, changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def test_it_works_where_dcscale_is_not_installed(made, tmp_path):
    source, folder = made
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    config = tiny_config(vocab_size=257)
    ids = random_ids(config, 2, 19)
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-c", USE_WITHOUT_DCSCALE, str(folder), str(tmp_path / "saved"), str(tmp_path / "ids")]
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 16])\ntorch.float32\n")
    with torch.no_grad():
        expected = random_model(config, dtype=torch.float32)(ids)
    assert (torch.load(tmp_path / "ids") - expected).abs().max() <= 1e-4
    convert(tmp_path / "saved", tmp_path / "again", "dcscale")
    before, after = tensors_of(source), tensors_of(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_files(made):
    _, folder = made
    names = {path.name for path in folder.iterdir() if not path.name.startswith("model-")}
    assert names == {
        *("config.json", "generation_config.json", "modeling_dcscale.py", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 256
    text = (folder / "modeling_dcscale.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported == {"copy", "torch", "transformers"}
    assert modeling_dcscale.SETTINGS["dcscale"][0] == {"format": FORMAT_VERSION}


def test_types(made, tmp_path):
    convert(made[1], tmp_path / "half", "dcscale", dtype="bf16")
    convert(tmp_path / "half", tmp_path / "exported", "huggingface")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "exported").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"


def test_byte_tokens_are_the_same_as_in_dcscale(made):
    exported, reference = transformers.AutoTokenizer.from_pretrained(made[1], trust_remote_code=True), ByteTokenizer()
    generator = random.Random(0)
    kinds = [range(0x20), range(0x20, 0x7F), range(0x80, 0x250), range(0x250, 0xD800), range(0xE000, 0x110000)]
    texts = ["", " ", "\r\n\t\0\x1c\x85\u2028", "a<|endoftext|>b", "\ufffd\ufeff", "e\u0301 é ＡÅ ﬁ"]
    texts += ["".join(chr(generator.choice(generator.choice(kinds))) for _ in range(40)) for _ in range(200)]
    for text in texts:
        ids = reference.encode(text)
        assert exported(text)["input_ids"] == exported.encode(text, add_special_tokens=False) == ids
        assert exported.decode(ids) == text
        ids = [generator.choice([*ids, 256, 0xFF, 0xE2, 0x80]) for _ in range(30)] if ids else []
        assert exported.decode(ids, skip_special_tokens=True) == reference.decode(ids)
    assert exported.eos_token_id == exported.pad_token_id == len(exported) - 1 == 256


def test_generate_stops_at_strings(made):
    model = transformers.AutoModelForCausalLM.from_pretrained(made[1], trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[1], trust_remote_code=True)
    not_letters = [*range(ord("a")), *range(ord("z") + 1, 257)]
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": not_letters}
    whole = model.generate(torch.tensor([[97, 98, 99]]), **options)
    stopped = model.generate(whole[:, :3], stop_strings=[chr(whole[0, 6])], tokenizer=tokenizer, **options)
    assert stopped.shape[1] < whole.shape[1] == 11
    assert torch.equal(stopped, whole[:, : stopped.shape[1]])


def seal_again(folder):
    (folder / MARKER).unlink()
    seal(folder)


def with_tokenizer(folder, eos_id, post=False):
    """A checkpoint whose tokenizer is a tokenizer.json."""
    write_checkpoint(folder, tiny_config())
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "b": 2}, unk_token="a"))
    if post:
        tokenizer.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder / "state.json", {"tokenizer": {"spec": "tokenizer.json", "eos_id": eos_id}})
    seal_again(folder)
    return folder


@pytest.mark.parametrize("post", [False, True])
def test_the_tokenizer_file_is_copied(post, tmp_path):
    source = with_tokenizer(tmp_path / "model", 1, post)
    done = convert(source, tmp_path / "exported", "huggingface")
    assert ["post-processor" in note for note in done.notes] == [True] * post
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    reference = HuggingFaceTokenizer(source / "tokenizer.json", "<end>")
    assert (exported.eos_token, exported.eos_token_id) == ("<end>", reference.eos_id)
    assert exported.encode("b", add_special_tokens=False) == reference.encode("b") == [2]
    convert(tmp_path / "exported", tmp_path / "back", "dcscale")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "back/state.json").read_text())["tokenizer"] == {
        "spec": "tokenizer.json",
        "eos_id": 1,
    }


TEMPLATE = "{% for m in messages %}<s>[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture
def chat(llama_tokenizer, tmp_path):
    """A Hugging Face folder with a tokenizer for chats, as others make it."""
    source = write_checkpoint(tmp_path / "model", tiny_config(vocab_size=340))
    shutil.copy(llama_tokenizer, source / "tokenizer.json")
    change(source / "state.json", {"tokenizer": {"spec": "tokenizer.json", "eos_id": 2}})
    seal_again(source)
    folder = tmp_path / "chat"
    convert(source, folder, "huggingface")
    token = {"content": "</s>", "lstrip": False}
    tokens = {"bos_token": "<s>", "eos_token": token, "unk_token": "<unk>", "additional_special_tokens": [token]}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None, "model_max_length": 99, "use_fast": False}
    given["auto_map"] = {"AutoTokenizer": ["own.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    generation = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True, "cache_implementation": "static"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    change(folder / "config.json", {"bos_token_id": 1})
    return folder


def test_chat_template_and_special_tokens_survive(chat, tmp_path):
    convert(chat, tmp_path / "own", "dcscale")
    convert(tmp_path / "own", tmp_path / "copy", "dcscale")
    again = tmp_path / "again"
    convert(tmp_path / "copy", again, "huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(again, trust_remote_code=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (
        1,
        2,
        0,
        2,
    )
    messages = [{"role": "user", "content": "Ann has a kind of"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>[user] Ann has a kind of</s>"
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert (ids[0], ids[-1], len(ids) < 20) == (1, 2, True)  # the template's tokens are special tokens
    assert tokenizer("the river").input_ids[0] == 1
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 99)
    settings = json.loads((again / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"auto_map", "use_fast"}
    model = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, [2, 5], 2)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.temperature) == (1, [2, 5], 0.6)
    assert generation.cache_implementation is None
    convert(again, tmp_path / "own", "dcscale", overwrite=True)
    convert(tmp_path / "own", again, "huggingface", overwrite=True)
    assert json.loads((again / "tokenizer_config.json").read_text()) == settings


def test_special_tokens_without_a_config_of_the_tokenizer_survive(chat, tmp_path):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (chat / name).unlink()
    convert(chat, tmp_path / "own", "dcscale")
    convert(tmp_path / "own", tmp_path / "again", "huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_files_of_a_tokenizer_that_cannot_be_read(chat, tmp_path):
    for name, content in (
        ("generation_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("special_tokens_map.json", b"[" * 10**5),
        ("chat_template.jinja", b"\xff"),
    ):
        given = shutil.copytree(chat, tmp_path / name)
        (given / name).write_bytes(content)
        with pytest.raises(ConversionError, match=f"{name} (cannot be read|must be a JSON object)"):
            convert(given, tmp_path / "own", "dcscale")
        assert not (tmp_path / "own").exists()


def test_missing_and_invalid_tokenizers(tmp_path):
    source = with_tokenizer(tmp_path / "model", 9)
    with pytest.raises(ConversionError, match=r"tokenizer.json has no token with the id 9, which ends a document"):
        prepare(source, "huggingface")
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "must be a JSON object, but is a list"),
        ('{"added_tokens": null}', "is not a tokenizer.json of Hugging Face"),
        ('{"model": {"vocab": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}', "is not a tokenizer.json of Hugging Face"),
    ):
        (source / "tokenizer.json").write_text(text)
        seal_again(source)
        with pytest.raises(ConversionError, match=rf"tokenizer.json {message}"):
            prepare(source, "huggingface")
    (source / "tokenizer.json").unlink()
    seal_again(source)
    done = convert(source, tmp_path / "exported", "huggingface")
    assert "the source has no tokenizer" in done.notes[-1]
    assert not list((tmp_path / "exported").glob("tokenizer*"))


def test_conversions_go_through_dcscale(folder, tmp_path):
    with pytest.raises(ConversionError, match="already has the format huggingface: convert it to dcscale"):
        prepare(folder, "huggingface")
    with pytest.raises(ConversionError, match="cannot be converted to upstream directly: convert it to dcscale first"):
        prepare(folder, "upstream")
    convert(write_checkpoint(tmp_path / "model", tiny_config()), tmp_path / "exported", "upstream")
    with pytest.raises(
        ConversionError, match="cannot be converted to huggingface directly: convert it to dcscale first"
    ):
        prepare(tmp_path / "exported", "huggingface")
    with pytest.raises(ConversionError, match="--gelu: only for upstream models"):
        prepare(folder, "dcscale", gelu="erf")


def test_a_folder_is_replaced_only_with_overwrite(made, folder):
    with pytest.raises(ConversionError, match="exists: choose another target"):
        convert(made[0], folder, "huggingface")
    convert(made[0], folder, "huggingface", overwrite=True)
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConversionError, match="it has files of others: README.md"):
        convert(made[0], folder, "huggingface", overwrite=True)


BOTH = {
    "format": ({"dcscale": {"format": 2}}, "format"),
    "no format": ({"dcscale": 1}, "format"),
    "attention": ({"attention": "linear"}, "attention"),
    "size": ({"layers": 0}, "layers"),
    "text": ({"dim": "wide"}, "dim"),
    "heads": ({"heads": 5}, "heads"),
    "kv_heads": ({"kv_heads": 3}, "kv_heads"),
    "epsilon": ({"norm_eps": 0.0}, "norm_eps"),
    "switch": ({"qk_norm": 1}, "qk_norm"),
    "windows": ({"windows": [5, 0]}, "windows"),
    "no windows": ({"windows": []}, "windows"),
    "rope": ({"rope_fraction": 0.4}, "rope_fraction"),
    "multi_gate": ({"multi_gate": 5}, "multi_gate"),
    "compose": ({"compose": {"static": True}}, "static"),
    "no compose": ({"compose": 3}, "compose"),
    "part of compose": ({"compose": {"gelu": "relu"}}, "gelu"),
    "rope scaling": ({"rope_frequency_scaling": {"kind": "llama3", "low_freq_factor": 4.0}}, "high_freq_factor"),
    "tied": ({"tie_word_embeddings": "perhaps"}, "tied_embeddings|tie_word_embeddings"),
}


@pytest.mark.parametrize("name", BOTH)
def test_settings_that_neither_dcscale_nor_transformers_accepts(name, folder):
    changes, named = BOTH[name]
    change(folder / "config.json", changes)
    with pytest.raises(ConversionError, match=f"its config .*({named})|(?s:cannot be used.*({named}))"):
        prepare(folder, "dcscale")
    settings = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=f"(?=.*({named}))the model's config has .*, but it must be"):
        modeling_dcscale.DCScaleConfig(**settings)


def test_settings_that_are_unknown_or_missing(folder):
    change(folder / "config.json", {"sliding": 3, "id2label": {}, "is_causal": False})
    with pytest.raises(ConversionError, match="does not know: sliding=3, is_causal=False; remove from config.json"):
        prepare(folder, "dcscale")
    settings = json.loads((folder / "config.json").read_text())
    for name in ("sliding", "is_causal", "windows", "tie_word_embeddings"):
        del settings[name]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="its config lacks tie_word_embeddings, windows: every setting"):
        prepare(folder, "dcscale")


def test_tensors_that_do_not_fit(folder):
    tensors = tensors_of(folder)
    for path in folder.glob("model*"):
        path.unlink()
    del tensors["norm.weight"]
    tensors["lm_head.weight"] = torch.ones(2)
    tensors["output.weight"] = torch.ones(3, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        prepare(folder, "dcscale")
    assert "norm.weight is missing" in str(error.value)
    assert "lm_head.weight [2] is not part of the model" in str(error.value)
    assert "output.weight has shape [3, 32], the config requires [257, 32]" in str(error.value)
    change(folder / "config.json", {"layers": 10**6})
    with pytest.raises(ConversionError, match=r"layers is 1000000, but .* has only 31 tensors"):
        prepare(folder, "dcscale")


def test_standard_names_of_settings():
    config = modeling_dcscale.DCScaleConfig(hidden_size=96, num_hidden_layers=3, compose={"rank": 1})
    assert (config.dim, config.layers, config.compose["rank"], config.compose["gates"]) == (96, 3, 1, True)
    assert set(modeling_dcscale.COMPOSE) == set(vars(ComposeConfig()))
    assert set(modeling_dcscale.ROPE_FREQUENCY_SCALING) == set(vars(RopeScalingConfig()))
    known = {*modeling_dcscale.SETTINGS, "compose", "rope_scaling", "tied_embeddings", "backend", "scratch_mib"}
    assert known - {"max_position_embeddings", "tie_word_embeddings", "use_cache", "dcscale"} == set(
        vars(tiny_config())
    )
