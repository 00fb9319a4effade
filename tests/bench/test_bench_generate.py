"""tools/bench_generate.py on a tiny model: its JSON, its table, its targets, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dcscale import provenance
from dcscale.bench import generate

TOOL = Path(__file__).parents[2] / "tools" / "bench_generate.py"
TINY = ["--layers", "2", "--dim", "16", "--heads", "2", "--ffn-dim", "24", "--vocab-size", "50"]
TINY += ["--prompt-tokens", "5", "--new-tokens", "3", "--rounds", "2", "--batch", "1", "2"]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("bench_generate", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_a_tiny_run_end_to_end(tool, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert tool.main([*TINY, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [(row["kind"], row["batch"]) for row in result["rows"]] == [(k, b) for b in (1, 2) for k in generate.KINDS]
    for row in result["rows"]:
        assert len(row["cpu_seconds"]) == len(row["wall_seconds"]) == row["rounds"] == 2
        rates = [row["batch"] * 3 / seconds for seconds in row["cpu_seconds"]]
        assert row["tokens_per_cpu_second"]["mean"] == pytest.approx(sum(rates) / 2)
    assert result["versions"].keys() >= {"torch", "transformers"}
    assert {target["verdict"] for target in result["targets"]} <= {"reached", "missed"}
    capsys.readouterr()
    tool.main(["--markdown", str(output)])
    assert "| Llama (no qk-norm), transformers | 2 | 2 |" in capsys.readouterr().out


def test_every_kind_writes_as_many_tokens_and_the_export_the_same_ones():
    shape = generate.Shape(2, 16, 2, 24, 50, prompt_tokens=5, new_tokens=6)
    prompts = generate.make_prompts(3, shape)
    written = {kind: run(prompts) for kind, run in generate.make_kinds(shape).items()}
    assert [len(row) for row in written["mha"]] == [6] * 3
    assert written["llama"].shape == (3, 5 + 6)
    assert written["export"][:, 5:].tolist() == written["dcscale"]


def test_another_result_of_the_export_is_an_error(tool, tmp_path, monkeypatch, capsys):
    exported = generate.exported

    def wrong(model):
        export = exported(model)
        torch.nn.init.zeros_(export.output.weight)
        return export

    monkeypatch.setattr(generate, "exported", wrong)
    assert tool.main([*TINY, "--output", str(tmp_path / "a.json")]) == 1
    assert "the export's logits differ from dcscale's by 1 of the largest" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_targets_compare_means_of_the_same_batch():
    rates = {1: {"dcscale": 79, "export": 78, "llama": 100}, 8: {"dcscale": 200, "export": 201, "llama": 250}}
    rows = [{"kind": k, "batch": b, "tokens_per_cpu_second": {"mean": r}} for b in rates for k, r in rates[b].items()]
    verdicts = [(each["verdict"], each["detail"]) for each in generate.judge(rows)]
    assert verdicts == [("missed", "0.79 x"), ("reached", "1.01 x"), ("reached", "0.80 x"), ("missed", "1.00 x")]


def test_wrong_options(tool, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text("{}")
    for arguments, message in (
        (["--rounds", "0"], "'0' must be a whole number of 1 or more"),
        (["--output", str(tmp_path / "a.txt")], "must end in .json"),
        (["--markdown", str(tmp_path / "a.json")], "it is not a result of bench_generate: KeyError 'shape'"),
    ):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(provenance, "_version", lambda package: None)
    with pytest.raises(SystemExit):
        tool.main(TINY)
    assert "transformers is not installed: pip install 'dcscale[hf]'" in capsys.readouterr().err
