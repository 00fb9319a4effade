"""Folders with upstream's own outputs: converted, they give its logits, and converting back gives equal tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcscale.checkpoint.layout import read_config
from dcscale.convert import convert, prepare
from dcscale.models import DCFormer
from dcscale.testing.models import load_tensors

ROOT = Path(__file__).parents[2]
IN_REPOSITORY, SHARED = ROOT / "tests" / "data" / "models", ROOT.parent / "shared" / "golden"
TOLERANCE = 2e-4
"""Largest absolute error of logits of the order 1, as in tests/models/test_golden.py."""

PYTORCH, ERF = {"gelu": "erf", "local_keys": 17}, {"gelu": "erf"}
CASES = {  # what a case's README states and its files do not
    "dcformer_train_LGLL_jax": {},
    "dcformer_train_LGLL_mgate": PYTORCH,
    "dcpythia_train_repaired": ERF,
    "dcformer_train_LG_jax": {},
    "dcformer_train_LG_mgate_noqknorm": PYTORCH,
    "dcformer_train_LG_noqknorm": PYTORCH,
    "dcformer_train_LG_qknorm": PYTORCH,
    "dcformer_train_stale_dw": {},  # its merged copies show that PyTorch trained it
    "dcformer_infer_LG": ERF,
    "dcformer_infer_LGLL_mgate": ERF,
    "dcformer_infer_LG_jax": {},
    "dcpythia_infer": PYTORCH,
    "dcpythia_infer_jax": {},
}
STALE = (".dw1", ".dd", ".qkw")


def case_folder(name: str) -> Path:
    for root in (IN_REPOSITORY, SHARED):
        if (root / name).is_dir():
            return root / name
    pytest.skip(f"{name} is not in the repository, and there is no {SHARED}")


def test_all_shared_cases_are_listed():
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED}")
    assert {path.name for path in SHARED.glob("dc*") if path.is_dir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    source, options = case_folder(name), CASES[name]
    convert(source, tmp_path / "model", "dcscale", **options)
    config = read_config(tmp_path / "model").model
    model = DCFormer(config)
    load_tensors(model, tmp_path / "model")
    values = load_file(source / "io.safetensors")
    logits = (
        values["logits"] if "logits" in values else torch.cat([values["logits_prefill"], values["logits_decode"]], 1)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(values["input_ids"]), logits, atol=TOLERANCE, rtol=0)

    convert(tmp_path / "model", tmp_path / "exported", "upstream")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "exported" / "model-00001.safetensors"),
    )
    copies = {name for name in before if name.endswith("_m")}
    untrained = STALE if name == "dcformer_train_stale_dw" else ("dw_m", "qkw_m")
    assert set(before) <= set(after)
    for key in set(before) - {key for key in before if key.endswith(untrained)}:
        assert torch.equal(before[key], after[key]), key
    assert all(before[key].shape == after[key].shape for key in copies)

    settings = json.loads((source / "config.json").read_text())
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    runtime = ("architectures", "is_training", "block_size", "mgate_dim", "window_size")
    same = [key for key in written if key in settings and key not in runtime]
    assert len(same) >= 14
    assert {key: settings[key] for key in same} == {key: written[key] for key in same}
    assert written["window_size"] == options.get("local_keys", 17 if name == "dcformer_train_stale_dw" else 16)

    convert(tmp_path / "exported", tmp_path / "again", "dcscale")
    first, second = (load_file(tmp_path / folder / "weights/model-00001.safetensors") for folder in ("model", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert read_config(tmp_path / "again").model == config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_decoding_a_batch_of_different_lengths_equals_the_full_forward(name, dtype):
    model = prepare(case_folder(name), "dcscale", **CASES[name]).load(torch.device("cpu"), dtype)
    ids = load_file(case_folder(name) / "io.safetensors")["input_ids"]
    padding, prompt = [0, 7], 20
    rows = [ids[0], ids[-1][: len(ids[-1]) - padding[1]]]
    batch = torch.stack([rows[0], torch.nn.functional.pad(rows[1], (padding[1], 0))])
    cache = model.new_cache(padding)
    with torch.no_grad():
        parts = [model(batch[:, :prompt], cache=cache)]
        parts += [model(batch[:, at : at + 1], cache=cache) for at in range(prompt, batch.shape[1])]
        for row, missing, decoded in zip(rows, padding, torch.cat(parts, dim=1)):
            full = model(row[None])[0]
            # Of the largest logit, about 4: each of the two is up to 7e-5 from the float64 result.
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype] * float(full.abs().max())
            torch.testing.assert_close(decoded[missing:], full, atol=tolerance, rtol=0)
