"""tools/convert_checkpoint.py as a user calls it, and that no half result is ever left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models

from dcscale.checkpoint import find_checkpoint
from dcscale.convert import ConversionError, conversion, convert
from dcscale.evaluation import open_trained
from dcscale.models import generate
from dcscale.testing.models import tensors_of, tiny_config, write_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_becomes_upstream_and_a_model_that_generates(tmp_path):
    source = write_checkpoint(tmp_path / "run/checkpoints/step-00000007", tiny_config(vocab_size=257), training=True)
    words = [sys.executable, str(TOOL), str(tmp_path / "run"), str(tmp_path / "theirs"), "--to", "upstream"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"is: dcscale training checkpoint {source}\n" in done.stdout
    assert "layers.*.attention.wqkv.weight  <-  blocks.*.attention.q.weight, blocks.*.attention.k.weight" in done.stdout
    assert done.stdout.endswith(f"wrote {tmp_path / 'theirs'}: 35 tensors\n")
    convert(tmp_path / "theirs", tmp_path / "ours", "dcscale")
    models = [open_trained(folder).load(torch.device("cpu"), torch.float32) for folder in (source, tmp_path / "ours")]
    tokenizer = open_trained(tmp_path / "ours").tokenizer
    assert tokenizer.eos_id == 256
    texts = [generate(model, [tokenizer.encode("abc")], 5, temperature=0, top_p=1, seed=0) for model in models]
    assert texts[0] == texts[1]


def test_the_tokenizer_comes_along(tmp_path, upstream_of):
    folder = upstream_of()
    del folder.settings["dcscale"]["tokenizer"]
    folder.settings["eos_token_id"] = 1
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")).save(str(folder.folder / "tokenizer.json"))
    convert(folder.write(), tmp_path / "ours", "dcscale")
    assert open_trained(tmp_path / "ours").tokenizer.eos_id == 1
    convert(tmp_path / "ours", tmp_path / "theirs", "upstream")
    assert (tmp_path / "theirs/tokenizer.json").read_text() == (folder.folder / "tokenizer.json").read_text()
    (folder.folder / "tokenizer.json").unlink()
    done = convert(folder.folder, tmp_path / "silent", "dcscale")
    assert "no tokenizer.json with an eos_token_id" in done.notes[-1]


def test_a_dry_run_shows_the_mapping_and_writes_nothing(tmp_path, call, upstream_of):
    folder = upstream_of().folder
    before = files_below(tmp_path)
    code, told, _ = call(folder, tmp_path / "new" / "ours", "--to", "dcscale", "--dry-run")
    assert code == 0
    assert f"{folder} is: upstream DCFormer folder {folder}\n" in told
    assert "blocks.*.attention.k.weight  <-  layers.*.attention.wqkv.weight  (rows 32 to 63)  x 2\n" in told
    assert "left out: layers.*.attention.dyn_w_proj.dw_m  (the original tensors are the trained ones)  x 2\n" in told
    assert told.endswith("dry run: nothing was written, and no values were checked\n")
    assert files_below(tmp_path) == before


def test_options_reach_the_conversion(tmp_path, call, upstream_of):
    words = ["--dtype", "bf16", "--from-copies", "merged", "--gelu", "tanh", "--local-keys", "9"]
    code, told, _ = call(upstream_of().folder, tmp_path / "ours", "--to", "dcscale", *words)
    assert code == 0
    assert "merged, as asked, though the merged copies equal the originals" in told
    config = open_trained(tmp_path / "ours").config
    assert (config.train.precision, config.model.compose.gelu, config.model.windows) == ("bf16", "tanh", [9, None])


def test_an_error_is_told_and_leaves_nothing(tmp_path, call, upstream_of):
    folder = upstream_of()
    folder.tensors["norm.weight"][3] = torch.nan
    before = files_below(folder.write().parent)
    code, _, told = call(folder.folder, tmp_path / "ours", "--to", "dcscale")
    assert code == 2
    assert told.startswith("error: ")
    assert "norm.weight  <-  norm.weight: 1 NaN and 0 infinite of 32" in told
    (tmp_path / "file").write_text("")
    assert call(folder.folder, tmp_path / "file" / "ours", "--to", "dcscale")[0] == 2
    (tmp_path / "file").unlink()
    assert files_below(tmp_path) == before


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "ours", tiny_config())


def test_the_tool_makes_and_reads_hugging_face_folders(tmp_path, call, source):
    code, told, _ = call(source, tmp_path / "theirs", "--to", "huggingface", "--dtype", "bf16")
    assert code == 0
    assert told.endswith(f"wrote {tmp_path / 'theirs'}: 31 tensors\n")
    code, told, _ = call(tmp_path / "theirs", tmp_path / "again", "--to", "dcscale")
    assert code == 0
    assert told.startswith(f"{tmp_path / 'theirs'} is: Hugging Face folder of a dcscale model {tmp_path / 'theirs'}\n")
    trained = open_trained(tmp_path / "again")
    assert (trained.config.train.precision, trained.tokenizer.eos_id) == ("bf16", 256)


def test_targets_that_are_refused(tmp_path, source):
    for target in (source, source / "weights" / "new", tmp_path):
        with pytest.raises(ConversionError, match="lie in each other: name another place"):
            convert(source, target, "upstream", overwrite=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConversionError, match="exists: name another place, or replace it with --overwrite"):
        convert(source, tmp_path / "there", "upstream")
    with pytest.raises(ConversionError, match="is not replaced, as it holds no model"):
        convert(source, tmp_path / "there", "upstream", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConversionError, match="exists: name another place"):
        convert(source, tmp_path / "link", "upstream")
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", tiny_config(), training=True)
    with pytest.raises(ConversionError, match="it is a run or a link"):
        convert(source, tmp_path / "run", "upstream", overwrite=True)
    with pytest.raises(ConversionError, match="it holds more than a model: deepspeed"):
        convert(source, tmp_path / "run" / "checkpoints" / "step-00000001", "upstream", overwrite=True)
    convert(source, tmp_path / "theirs", "upstream")
    (tmp_path / "theirs" / "modeling_dcformer.py").write_text("mine")
    with pytest.raises(ConversionError, match=r"it holds more than a model: modeling_dcformer.py"):
        convert(source, tmp_path / "theirs", "upstream", overwrite=True)


def test_overwrite_replaces_a_model_only_by_a_whole_one(tmp_path, source, monkeypatch):
    other = write_checkpoint(tmp_path / "other", tiny_config(dim=16))
    target = tmp_path / "result"
    convert(source, target, "upstream")
    before = tensors_of(target)

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_json", full_disk)
        with pytest.raises(OSError, match="no space left"):
            convert(other, target, "upstream", overwrite=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(target).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "ours", "result"]

    convert(other, target, "dcscale", overwrite=True)
    assert tensors_of(target)["norm.weight"].shape == (16,)
    assert find_checkpoint(target) == target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "ours", "result"]


def test_what_a_killed_conversion_left_is_cleared(tmp_path, source):
    (tmp_path / ".unfinished-result" / "half").mkdir(parents=True)
    convert(source, tmp_path / "result", "upstream")
    # Killed between the two renames, the old folder is beside its place.
    (tmp_path / "result").rename(tmp_path / ".unfinished-result-old")
    convert(source, tmp_path / "result", "dcscale")
    assert find_checkpoint(tmp_path / "result") == tmp_path / "result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "result"]


def test_a_writer_that_fails_is_told(tmp_path, source, monkeypatch):
    def fail(*_):
        raise SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(conversion, "save_weights", fail)
    with pytest.raises(ConversionError, match="result cannot be written: I/O error"):
        convert(source, tmp_path / "result", "dcscale")
    assert not (tmp_path / "result").exists()
