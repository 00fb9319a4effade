"""tools/evaluate.py on a run and on an upstream folder, and what it rejects."""

import json
import math
import re
import shutil

import pytest
from tokenizers import Tokenizer, models

from dcscale.convert import convert
from dcscale.observe import read_metrics
from dcscale.testing.distributed import run_distributed
from dcscale.testing.models import tiny_config as tiny_model
from dcscale.testing.models import write_checkpoint
from dcscale.testing.runs import tiny_config, train_all

TASK = {"task_id": "ends", "texts": "heads are [ composed ] by small [ matrices ]"}


@pytest.fixture
def call(caller, load_tool):
    return caller(load_tool("evaluate"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A run that validates and saves at steps 4 and 8, and its shards."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "shards").symlink_to(shards)
    run_distributed(train_all, 1, [tiny_config(folder / "run", shards, "checkpoint.interval=4")])
    return folder


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A tiny model as a model folder, and converted to an upstream folder."""
    folder = tmp_path_factory.mktemp("upstream")
    convert(write_checkpoint(folder / "dcscale", tiny_model(vocab_size=257)), folder / "upstream", "upstream")
    return folder


@pytest.fixture
def files(tmp_path):
    """A folder with a text file and a file of tasks."""
    (tmp_path / "text.txt").write_text("Heads are composed by small matrices. " * 3)
    (tmp_path / "tasks.jsonl").write_text((json.dumps(TASK) + "\n") * 3 + json.dumps({**TASK, "task_id": "x"}) + "\n")
    return tmp_path


@pytest.mark.distributed
@pytest.mark.parametrize("step", [4, 8])
def test_the_loss_on_shards_is_the_validation_loss(trained, tmp_path, call, step):
    (logged,) = [
        record
        for record in read_metrics(trained / "run" / "metrics.jsonl")
        if record["step"] == step and "validation_loss" in record
    ]
    checkpoint = trained / "run" if step == 8 else trained / "run" / "checkpoints" / f"step-{step:08d}"
    arguments = ["--shards", trained / "shards" / "validation", "--batch-size", 4]
    code, out, err = call(checkpoint, *arguments, "--output", tmp_path / "out.json")
    assert code == 0, err
    assert re.search(rf"is: dcscale training checkpoint .*step-0000000{step} \(step {step}\)\n", err)
    assert "sequence 6/6 | " in err
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["losses"]
    assert row["loss"] == pytest.approx(logged["validation_loss"], rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert (result["step"], result["dtype"], result["device"]) == (step, "float32", "cpu")
    assert result["settings"]["context"] == 32
    assert result["settings"]["document_mask"] is True
    assert f"{row['loss']:.4f}" in out
    assert (row["sequences"], result["settings"]["sequences"]) == (6, 6), "the run's validation.sequences"
    name, count, spread = (
        f"\n{trained}/shards/validation",
        row["of_sequences"],
        "spread evenly (--sequences all uses all)",
    )
    assert out.endswith(f"{name}: 6 of {count} sequences were used, {spread}\n")
    fewer, complete = (call(checkpoint, *arguments, "--sequences", number)[1] for number in (4, "all"))
    assert fewer.endswith(f"{name}: 4 of {count} sequences were used, {spread}\n")
    assert complete.endswith(f"{name}: {count} of {count} sequences were used\n")
    unmasked = call(checkpoint, *arguments, "--no-document-mask")
    assert unmasked[0] == 0
    assert unmasked[1] != out


def test_an_upstream_folder_gives_the_results_of_its_model_folder(upstream, files, call):
    arguments = ["--text", files / "text.txt", "--jsonl", files / "tasks.jsonl", "--jsonl", files / "tasks.jsonl"]
    arguments += ["--batch-size", 3, "--context", 60, "--stride", 20, "--begin-id", 256, "--output", files / "out.json"]
    results, tables = [], []
    for name in ("dcscale", "upstream"):
        code, out, err = call(upstream / name, *arguments, "--dtype", "fp32")
        assert code == 0, err
        results.append(json.loads((files / "out.json").read_text()))
        tables.append(out)
    assert "is: upstream DCFormer folder " in err
    assert "\nnote: trained tensors of compose: original, the merged copies equal the originals\n" in err
    assert tables[0] == tables[1]
    first, second = results
    assert (first["losses"], first["accuracies"]) == (second["losses"], second["accuracies"])
    assert (first["step"], second["step"]) == (7, None)
    assert second["source"] == f"upstream DCFormer folder {upstream / 'upstream'}"
    assert len(second["notes"]) == 1
    assert second["command"]
    assert second["machine"]["device"] == "cpu"

    assert second["losses"][0]["tokens"] == 38 * 3
    assert second["settings"]["begin_id"] == 256
    counts = [(row["task"], row["texts"], row["answers"], row["tokens"]) for row in second["accuracies"]]
    of_file = [("ends", 3, 6, 48), ("x", 1, 2, 16), (None, 4, 8, 64)]
    assert counts == [*of_file, *of_file, (None, 8, 16, 128)]
    assert second["accuracies"][-1]["name"] is None
    assert re.search(r"^- +- +8 +16 +0\.\d{4} +128 +0\.\d{4}$", tables[0], re.MULTILINE)


def test_generate_takes_an_upstream_folder(upstream, caller, load_tool):
    call = caller(load_tool("generate"))
    arguments = ["--prompt", "heads", "--prompt", "a", "--new-tokens", 5, "--temperature", 0, "--dtype", "fp32"]
    first, second = (call(upstream / name, *arguments) for name in ("dcscale", "upstream"))
    assert first[0] == second[0] == 0
    assert first[1] == second[1]
    assert "is: upstream DCFormer folder " in second[2]
    assert call(upstream / "dcscale", *arguments, "--begin-id", 256)[1] != first[1]


def test_source_options_are_used(upstream, files, call):
    arguments = [upstream / "upstream", "--text", files / "text.txt", "--output", files / "out.json"]
    code, _, err = call(*arguments, "--from-copies", "merged", "--gelu", "tanh", "--local-keys", 2, "--dtype", "bf16")
    assert code == 0
    assert "note: trained tensors of compose: merged, as requested" in err
    other = json.loads((files / "out.json").read_text())
    assert other["dtype"] == "bfloat16"
    assert call(*arguments)[0] == 0
    assert json.loads((files / "out.json").read_text())["losses"] != other["losses"]


def test_tokens_that_cross_a_mark_are_reported(upstream, files, call):
    vocabulary = ["<eos>", *sorted(set(TASK["texts"])), " b"]
    merges = [(" ", "b"), ("d", " b")]
    library = Tokenizer(models.BPE({token: i for i, token in enumerate([*vocabulary, "d b"])}, merges))
    library.save(str(files / "tokenizer.json"))
    arguments = ["--tokenizer", files / "tokenizer.json", "--eos-token", "<eos>", "--jsonl", files / "tasks.jsonl"]
    code, out, err = call(upstream / "dcscale", *arguments)
    assert code == 0, err
    note = "4 of 4 texts have a token that crosses a mark: it counts as part of the answer"
    assert out.endswith(f"{files / 'tasks.jsonl'}: {note}\n")


def test_a_result_that_cannot_be_written_is_an_error_after_the_table(upstream, files, caller, load_tool, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    tool = load_tool("evaluate")
    monkeypatch.setattr(tool, "write_json", full_disk)
    arguments = [upstream / "dcscale", "--text", files / "text.txt", "--output", files / "out.json"]
    code, out, err = caller(tool)(*arguments)
    assert code == 2
    assert "perplexity" in out
    assert err.endswith("error: No space left on device\n")


def test_what_is_rejected(upstream, files, tmp_path, call):
    model, text, tasks = upstream / "dcscale", files / "text.txt", files / "tasks.jsonl"
    (tmp_path / "bad.jsonl").write_text(json.dumps(TASK) + "\n" + json.dumps({"task_id": "t", "texts": "a [ b"}) + "\n")
    for arguments, message in (
        ([model], "name what to measure by --shards, --text or --jsonl"),
        ([tmp_path / "absent", "--text", text], "absent is not a folder"),
        ([model, "--text", text, "--gelu", "erf"], "--gelu: only for upstream models"),
        ([model, "--text", text, "--batch-size", "0"], "--batch-size: '0' must be a whole number of 1 or more"),
        ([model, "--shards", text, "--sequences", "some"], "'some' must be a whole number of 1 or more, or all"),
        ([model, "--text", text, "--begin-id", "-1"], "--begin-id: '-1' must be a whole number of 0 or more"),
        ([model, "--text", text, "--begin-id", "257"], "--begin-id is 257, but must be below the model's 257 tokens"),
        ([model, "--text", text, "--context", "ten"], "--context: 'ten' must be a whole number of 1 or more"),
        ([model, "--text", text, "--context", "8", "--stride", "9"], "stride is 9, but must be from 1 to the context"),
        ([model, "--text", text, "--device", "abacus"], "--device: 'abacus' cannot be used: "),
        ([model, "--text", text, "--output", tmp_path / "a.txt"], "must end in .json"),
        ([model, "--text", text, "--output", tmp_path / "absent" / "a.json"], "is not a writable folder"),
        ([model, "--text", text, "--output", text / "a.json"], "text.txt is not a writable folder"),
        ([model, "--text", text, "--tokenizer", tmp_path / "t.json"], "t.json: cannot be read: No such file"),
        ([model, "--text", text, tmp_path / "no.txt"], "no.txt: cannot be read as UTF-8 text"),
        ([model, "--shards", tmp_path / "no"], "no: no such folder; give a folder of shards"),
        ([model, "--jsonl", tasks, tmp_path / "bad.jsonl"], "bad.jsonl, line 2: '[' in 'a [ b' is not part of a pair"),
        ([model, "--jsonl", tasks, "--context", "20"], "tasks.jsonl, line 1: needs 35 tokens up to its last answer"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err, err


def test_a_model_without_a_tokenizer_can_still_be_measured_on_shards(upstream, trained, tmp_path, call):
    folder = shutil.copytree(upstream / "upstream", tmp_path / "copy")
    settings = json.loads((folder / "config.json").read_text())
    del settings["dcscale"]["tokenizer"]
    (folder / "config.json").write_text(json.dumps(settings))
    code, out, err = call(folder, "--shards", trained / "shards" / "validation", "--context", 256)
    assert code == 0, err
    assert "bits per byte" in out
    assert re.search(r": (\d+) of \1 sequences were used\n$", out), "all of them, as the model is not from a run"
    code, _, err = call(folder, "--text", __file__)
    assert code == 2
    assert "has no tokenizer.json: name one with --tokenizer, or 'byte'" in err
