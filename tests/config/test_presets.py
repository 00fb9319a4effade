"""The configs in configs/ are valid, alone and together, and the presets have the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcscale.config import Config, check_config, differences, load_config
from dcscale.models import count_parameters
from dcscale.train.advice import advice

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "train").glob("*.yaml"))
OWN_DATA = CONFIGS / "data" / "own-shards.yaml"


def model(name: str, *overrides: str) -> Config:
    return load_config([CONFIGS / "model" / f"{name}.yaml"], list(overrides)).config


def test_all_presets_and_recipes_are_tested() -> None:
    sizes = ["125m", "2.8b", "30m", "405m", "8b"]
    assert [path.stem for path in MODELS] == [*(f"dcformer-{size}" for size in sizes), "dcpythia-6.9b"]
    assert [path.stem for path in RECIPES] == ["125m", "2.8b", "30m", "405m-one-gpu", "405m", "6.9b", "8b"]


RUN_CONFIGS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "cluster")


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_each_file_loads_with_origins_and_starts_with_a_comment(path: Path) -> None:
    loaded = load_config([path])
    assert any(origin.startswith(f"{path}:") for origin in loaded.origins.values())
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("attention", ["dcmha", "mha"])
def test_every_model_and_its_twin_work_with_every_recipe(preset: Path, recipe: Path, attention: str) -> None:
    loaded = load_config([preset, recipe, OWN_DATA], [f"model.attention={attention}"])
    for world_size in (1, 8, 32):
        assert check_config(loaded.config, world_size) == []


# Model, recipe, GPUs, their memory in GiB, tokens of the recipe per parameter.
PAIRS = [
    ("dcformer-30m", "30m", 1, 8, 20),
    ("dcformer-125m", "125m", 1, 16, 20),
    ("dcformer-405m", "405m-one-gpu", 1, 24, 17),
    ("dcformer-405m", "405m", 64, 40, 17),
    ("dcformer-2.8b", "2.8b", 64, 80, 105),
    ("dcpythia-6.9b", "6.9b", 64, 80, 43),
    ("dcformer-8b", "8b", 64, 80, 20),
]


@pytest.mark.parametrize(("name", "recipe", "ranks", "gib", "tokens"), PAIRS, ids=[pair[1] for pair in PAIRS])
def test_a_recipe_starts_without_warnings_on_the_gpus_that_it_is_for(
    name: str, recipe: str, ranks: int, gib: int, tokens: int
) -> None:
    config = load_config([CONFIGS / "model" / f"{name}.yaml", CONFIGS / "train" / f"{recipe}.yaml", OWN_DATA]).config
    assert check_config(config, ranks) == []
    assert advice(config, ranks, None, gib * 2**30) == []
    trained = config.train.steps * config.train.global_batch_size * config.data.sequence_length
    assert round(trained / count_parameters(config.model).total) == tokens


def test_one_gpu_trains_the_405m_as_many_do() -> None:
    recipes = [load_config([CONFIGS / "train" / f"{name}.yaml"]).config for name in ("405m", "405m-one-gpu")]
    assert [path for path, *_ in differences(*recipes)] == ["train.micro_batch_size", "train.recompute"]


def test_quickstart_is_valid() -> None:
    config = load_config([CONFIGS / "quickstart.yaml"]).config
    for world_size in (1, 2):  # launch/quickstart.sh sets the batch for more
        assert check_config(config, world_size) == []


# Layers, width, heads, hidden width of the feed-forward network, gates over it, vocabulary, embedding matrices.
SIZES = {
    "dcformer-30m": (8, 512, 8, 1408, 0, 8192, 1),
    "dcformer-125m": (12, 768, 12, 2112, 0, 50257, 1),
    "dcformer-405m": (24, 1024, 16, 2816, 0, 50256, 2),
    "dcformer-2.8b": (32, 2560, 32, 6912, 0, 50256, 2),
    "dcformer-8b": (48, 4096, 32, 5632, 44, 152064, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_dcformers_have_the_stated_sizes(name: str) -> None:
    layers, dim, heads, ffn, gates, vocabulary, embeddings = SIZES[name]
    counted = count_parameters(model(name).model)
    block = 4 * dim**2 + 3 * dim * ffn + dim * gates + 2 * dim + 2 * (dim // heads)
    assert counted.compose == layers * (20 * dim * heads + 64 * heads**2)
    assert counted.total - counted.compose == embeddings * vocabulary * dim + layers * block + dim


def test_dcpythia_is_pythia_with_compose_and_qk_norm() -> None:
    counted = count_parameters(model("dcpythia-6.9b").model)
    pythia = 6_857_302_016 - 2 * (50432 - 50257) * 4096  # as published, minus the padding of its vocabulary
    assert counted.compose == 32 * (20 * 4096 * 32 + 64 * 32**2)
    assert counted.total - counted.compose == pythia + 32 * 2 * 128


@pytest.mark.parametrize("preset", MODELS, ids=lambda path: path.stem)
def test_the_twin_has_the_same_size_without_compose(preset: Path) -> None:
    counted = count_parameters(model(preset.stem).model)
    assert count_parameters(model(preset.stem, "model.attention=mha").model).total == counted.total - counted.compose
