"""The reference is complete: every field of every dataclass of the schema is explained below it, and listed."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from dcscale.config import schema
from dcscale.config.reference import FIELDS, docstrings, get, has_type, reference, sections, type_name, walk
from dcscale.config.schema import Config, OptimizerRule

CLASSES = [c for c in vars(schema).values() if dataclasses.is_dataclass(c)]


@pytest.mark.parametrize("section", CLASSES, ids=lambda c: c.__name__)
def test_every_field_has_a_docstring(section: type) -> None:
    explained, hints = docstrings(section), typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        # A section is explained by the docstring of its class.
        text = inspect.getdoc(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else None
        text = explained.get(field.name) or text
        assert text, f"{section.__name__}.{field.name} has no docstring"
        assert text.endswith("."), f"{section.__name__}.{field.name}: {text}"


@pytest.mark.parametrize("section", CLASSES, ids=lambda c: c.__name__)
def test_every_class_has_a_docstring_of_its_own(section: type) -> None:
    assert not inspect.getdoc(section).startswith(f"{section.__name__}(")  # dataclass would write the signature


def test_the_reference_holds_every_key_with_type_default_values_and_meaning() -> None:
    lines = reference().splitlines()
    for path, field in FIELDS.items():
        (row,) = [line for line in lines if line.startswith(f"| {path} | ")]
        assert field.meaning in row
        assert f"| {type_name(field.type)} |" in row
    assert (
        "| model.kv_heads | int or null | null | at least 1 | Key/value heads per layer; null means as many as "
        "``heads``, fewer is grouped-query attention. Must divide ``heads``. |"
    ) in lines
    assert (
        "| parallel.zero_stage | int | 1 | 0, 1, 2, 3 | ZeRO stage, what is partitioned: 0 nothing, 1 " in reference()
    )
    assert "| model.windows | list of (int or null) | [256, null] | at least 1 |" in reference()
    for path, _ in sections(Config):
        assert f"## {path}" in lines


def test_the_reference_holds_the_keys_of_the_items_of_a_list() -> None:
    table = reference().partition("## optimizer.rules[]\n")[2].partition("\n## ")[0]
    for field in walk(OptimizerRule):
        assert f"| {field.path} | {type_name(field.type)} |" in table


def test_every_row_has_all_cells() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}


def test_fields_match_the_schema() -> None:
    config = Config()
    for path, field in FIELDS.items():
        assert get(config, path) == field.default
        assert has_type(field.default, field.type)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        (1.0, int, False),
        (True, bool, True),
        (1, bool, False),
        (None, int | None, True),
        (None, int, False),
        ("a", str, True),
        ([1, None], list[int | None], True),
        ([1, "a"], list[int | None], False),
        ((1,), list[int], False),
        ([OptimizerRule("a")], list[OptimizerRule], True),
        ([OptimizerRule(3)], list[OptimizerRule], False),
        ([{}], list[OptimizerRule], False),
    ],
)
def test_types(value: object, hint: object, fits: bool) -> None:
    assert has_type(value, hint) is fits


def test_items_of_lists_have_paths() -> None:
    config = Config()
    config.optimizer.rules = [OptimizerRule("a"), OptimizerRule("b", 2.0)]
    assert get(config, "optimizer.rules[1].lr_scale") == 2.0
    assert get(config, "model.windows[0]") == 256
