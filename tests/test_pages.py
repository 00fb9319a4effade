"""The pages of the repository: relative links resolve, and what is generated from the code is current.

python tests/test_pages.py      # rewrites the generated parts
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcscale.config.cluster import cluster_table
from dcscale.config.reference import reference
from dcscale.doctor.local import checks_table
from dcscale.observe.events import events_table
from dcscale.observe.metrics import metrics_table

ROOT = Path(__file__).parents[1]
SETTINGS, TRAINING, OBSERVE, DOCTOR = (
    ROOT / "dcscale" / folder / "README.md" for folder in ("config", "train", "observe", "doctor")
)
CLUSTERS = ROOT / "configs" / "cluster" / "README.md"
MOST_LINES_OF_README = 150


def pages() -> list[Path]:
    return [path for path in ROOT.rglob("*.md") if not {".venv", "runs", "node_modules"} & set(path.parts)]


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere, and files of the repository that it names in `code` and are not."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and "://" not in target and not (page.parent / path).exists():
            found.append(target)
    for name in re.findall(r"`((?:dcscale|launch|tools|tests|configs)/[\w./-]+)`", text):
        if not (ROOT / name).exists():
            found.append(name)
    return found


def generated() -> dict[Path, str]:
    """Pages with generated parts, as they should be."""
    return {
        SETTINGS: reference(),
        TRAINING: with_table(TRAINING, "metrics", metrics_table()),
        OBSERVE: with_table(OBSERVE, "events", events_table()),
        DOCTOR: with_table(DOCTOR, "checks", checks_table()),
        CLUSTERS: with_table(CLUSTERS, "cluster", cluster_table()),
    }


def with_table(page: Path, name: str, table: str) -> str:
    """The text of a page with another table between the comments with this name."""
    place = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("[x](missing.py) [y](https://a.b) [z](a.md#part) `dcscale/none.py`\n```\n[c](code.md)\n```\n")
    assert broken_links(page) == ["missing.py", "dcscale/none.py"]


def test_generated_pages_are_current() -> None:
    for page, text in generated().items():
        assert page.read_text(encoding="utf-8") == text, f"{page} is out of date: run python {Path(__file__).name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_README


if __name__ == "__main__":
    for page, text in generated().items():
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
