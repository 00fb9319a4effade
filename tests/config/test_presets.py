"""The configs in configs/ are valid, alone and together, and the presets have the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcscale.config import Config, check_config, load_config
from dcscale.models import count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "train").glob("*.yaml"))
OWN_DATA = CONFIGS / "data" / "own-shards.yaml"


def model(name: str, *overrides: str) -> Config:
    return load_config([CONFIGS / "model" / f"{name}.yaml"], list(overrides)).config


def test_all_presets_and_recipes_are_tested() -> None:
    assert [path.stem for path in MODELS] == ["dcformer-2.8b", "dcformer-405m", "dcformer-8b", "dcpythia-6.9b"]
    assert [path.stem for path in RECIPES] == ["2.8b", "405m", "6.9b"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
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


def test_quickstart_is_valid() -> None:
    config = load_config([CONFIGS / "quickstart.yaml"]).config
    for world_size in (1, 2):  # launch/quickstart.sh sets the batch for more
        assert check_config(config, world_size) == []


# Layers, width, heads, hidden width of the feed-forward network, gates over it, vocabulary.
PUBLISHED = {
    "dcformer-405m": (24, 1024, 16, 2816, 0, 50256),
    "dcformer-2.8b": (32, 2560, 32, 6912, 0, 50256),
    "dcformer-8b": (48, 4096, 32, 5632, 44, 152064),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_dcformers_have_the_published_sizes(name: str) -> None:
    layers, dim, heads, ffn, gates, vocabulary = PUBLISHED[name]
    counted = count_parameters(model(name).model)
    block = 4 * dim**2 + 3 * dim * ffn + dim * gates + 2 * dim + 2 * (dim // heads)
    assert counted.compose == layers * (20 * dim * heads + 64 * heads**2)
    assert counted.total - counted.compose == 2 * vocabulary * dim + layers * block + dim


def test_dcpythia_is_pythia_with_compose_and_qk_norm() -> None:
    counted = count_parameters(model("dcpythia-6.9b").model)
    pythia = 6_857_302_016 - 2 * (50432 - 50257) * 4096  # as published, minus the padding of its vocabulary
    assert counted.compose == 32 * (20 * 4096 * 32 + 64 * 32**2)
    assert counted.total - counted.compose == pythia + 32 * 2 * 128


@pytest.mark.parametrize("preset", MODELS, ids=lambda path: path.stem)
def test_the_twin_has_the_same_size_without_compose(preset: Path) -> None:
    counted = count_parameters(model(preset.stem).model)
    assert count_parameters(model(preset.stem, "model.attention=mha").model).total == counted.total - counted.compose
