"""tools/convert_checkpoint.py as a user calls it, and that it never leaves an incomplete result."""

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
    command = [sys.executable, str(TOOL), str(tmp_path / "run"), str(tmp_path / "exported"), "--to", "upstream"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"is: dcscale training checkpoint {source}\n" in done.stdout
    assert "layers.*.attention.wqkv.weight  <-  blocks.*.attention.q.weight, blocks.*.attention.k.weight" in done.stdout
    assert done.stdout.endswith(f"wrote {tmp_path / 'exported'}: 35 tensors\n")
    convert(tmp_path / "exported", tmp_path / "model", "dcscale")
    models = [open_trained(folder).load(torch.device("cpu"), torch.float32) for folder in (source, tmp_path / "model")]
    tokenizer = open_trained(tmp_path / "model").tokenizer
    assert tokenizer.eos_id == 256
    texts = [generate(model, [tokenizer.encode("abc")], 5, temperature=0, top_p=1, seed=0) for model in models]
    assert texts[0] == texts[1]


def test_the_tokenizer_is_copied(tmp_path, upstream_of):
    folder = upstream_of()
    del folder.settings["dcscale"]["tokenizer"]
    folder.settings["eos_token_id"] = 1
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")).save(str(folder.folder / "tokenizer.json"))
    convert(folder.write(), tmp_path / "model", "dcscale")
    assert open_trained(tmp_path / "model").tokenizer.eos_id == 1
    convert(tmp_path / "model", tmp_path / "exported", "upstream")
    assert (tmp_path / "exported/tokenizer.json").read_text() == (folder.folder / "tokenizer.json").read_text()
    (folder.folder / "tokenizer.json").unlink()
    done = convert(folder.folder, tmp_path / "silent", "dcscale")
    assert "no tokenizer.json with an eos_token_id" in done.notes[-1]


def test_a_dry_run_shows_the_mapping_and_writes_nothing(tmp_path, call, upstream_of):
    folder = upstream_of().folder
    before = files_below(tmp_path)
    code, output, _ = call(folder, tmp_path / "new" / "model", "--to", "dcscale", "--dry-run")
    assert code == 0
    assert f"{folder} is: upstream DCFormer folder {folder}\n" in output
    assert "blocks.*.attention.k.weight  <-  layers.*.attention.wqkv.weight  (rows 32 to 63)  x 2\n" in output
    assert "dropped: layers.*.attention.dyn_w_proj.dw_m  (the original tensors are the trained ones)  x 2\n" in output
    assert output.endswith("dry run: nothing was written, and no values were checked\n")
    assert files_below(tmp_path) == before


def test_options_reach_the_conversion(tmp_path, call, upstream_of):
    arguments = ["--dtype", "bf16", "--from-copies", "merged", "--gelu", "tanh", "--local-keys", "9"]
    code, output, _ = call(upstream_of().folder, tmp_path / "model", "--to", "dcscale", *arguments)
    assert code == 0
    assert "merged, as requested, although the merged copies equal the originals" in output
    config = open_trained(tmp_path / "model").config
    assert (config.train.precision, config.model.compose.gelu, config.model.windows) == ("bf16", "tanh", [9, None])


def test_an_error_is_printed_and_leaves_nothing(tmp_path, call, upstream_of):
    folder = upstream_of()
    folder.tensors["norm.weight"][3] = torch.nan
    before = files_below(folder.write().parent)
    code, _, output = call(folder.folder, tmp_path / "model", "--to", "dcscale")
    assert code == 2
    assert output.startswith("error: ")
    assert "norm.weight  <-  norm.weight: 1 NaN and 0 infinite of 32" in output
    (tmp_path / "file").write_text("")
    assert call(folder.folder, tmp_path / "file" / "model", "--to", "dcscale")[0] == 2
    (tmp_path / "file").unlink()
    assert files_below(tmp_path) == before


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "model", tiny_config())


def test_the_tool_writes_and_reads_hugging_face_folders(tmp_path, call, source):
    code, output, _ = call(source, tmp_path / "exported", "--to", "huggingface", "--dtype", "bf16")
    assert code == 0
    assert output.endswith(f"wrote {tmp_path / 'exported'}: 31 tensors\n")
    code, output, _ = call(tmp_path / "exported", tmp_path / "again", "--to", "dcscale")
    assert code == 0
    assert output.startswith(
        f"{tmp_path / 'exported'} is: Hugging Face folder of a dcscale model {tmp_path / 'exported'}\n"
    )
    trained = open_trained(tmp_path / "again")
    assert (trained.config.train.precision, trained.tokenizer.eos_id) == ("bf16", 256)


def test_targets_that_are_refused(tmp_path, source):
    for target in (source, source / "weights" / "new", tmp_path):
        with pytest.raises(ConversionError, match="contain one another: choose another target"):
            convert(source, target, "upstream", overwrite=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConversionError, match="exists: choose another target, or replace it with --overwrite"):
        convert(source, tmp_path / "there", "upstream")
    with pytest.raises(ConversionError, match="is not replaced, because it is not a model"):
        convert(source, tmp_path / "there", "upstream", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConversionError, match="exists: choose another target"):
        convert(source, tmp_path / "link", "upstream")
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", tiny_config(), training=True)
    with pytest.raises(ConversionError, match="it is a run or a link"):
        convert(source, tmp_path / "run", "upstream", overwrite=True)
    with pytest.raises(ConversionError, match="it has files of others: optimizer"):
        convert(source, tmp_path / "run" / "checkpoints" / "step-00000001", "upstream", overwrite=True)
    convert(source, tmp_path / "exported", "upstream")
    (tmp_path / "exported" / "modeling_dcformer.py").write_text("mine")
    with pytest.raises(ConversionError, match=r"it has files of others: modeling_dcformer.py"):
        convert(source, tmp_path / "exported", "upstream", overwrite=True)


def test_overwrite_replaces_a_model_only_by_a_complete_one(tmp_path, source, monkeypatch):
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "result"]

    convert(other, target, "dcscale", overwrite=True)
    assert tensors_of(target)["norm.weight"].shape == (16,)
    assert find_checkpoint(target) == target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "result"]


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path, source):
    (tmp_path / ".unfinished-result" / "half").mkdir(parents=True)
    convert(source, tmp_path / "result", "upstream")
    # If the process is killed between the two renames, the old folder has its temporary name.
    (tmp_path / "result").rename(tmp_path / ".unfinished-result-old")
    convert(source, tmp_path / "result", "dcscale")
    assert find_checkpoint(tmp_path / "result") == tmp_path / "result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "result"]


def test_a_failed_write_is_reported(tmp_path, source, monkeypatch):
    def fail(*_):
        raise SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(conversion, "save_weights", fail)
    with pytest.raises(ConversionError, match="result cannot be written: I/O error"):
        convert(source, tmp_path / "result", "dcscale")
    assert not (tmp_path / "result").exists()
