"""Files of clusters: those of the repository can be read, and every mistake in one is named with its way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcscale.config import ConfigError
from dcscale.config.cluster import Cluster, cluster_table, load_cluster
from dcscale.hardware import PEAK_TFLOPS_BF16

FILES = sorted((Path(__file__).parents[2] / "configs" / "cluster").glob("*.yaml"))
EIGHT = next(path for path in FILES if path.name == "8xh100-infiniband.yaml")


def load(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_cluster(path, PEAK_TFLOPS_BF16)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_cluster_of_the_repository_can_be_read(path: Path) -> None:
    cluster = load_cluster(path, PEAK_TFLOPS_BF16)
    assert cluster.gpu in PEAK_TFLOPS_BF16
    assert cluster.gpus_per_node == int(path.name[0])
    assert cluster.price.date == "2026-11-27"


def test_values_and_sections_are_typed() -> None:
    cluster = load_cluster(EIGHT, PEAK_TFLOPS_BF16)
    assert (cluster.nodes, cluster.links.inside_node.gb_per_second) == (64, 450)
    assert cluster.storage.shared.total_write_gb_per_second == 80
    assert "Llama 3 paper" in cluster.failures.source


ASSUMPTION = "assumption: whole nodes with InfiniBand, reserved for months"
MISTAKES = [
    ("gpu: H100 80GB HBM3", "gpu: H100", 'gpu = "H100"', "of dcscale/hardware.py; did you mean H100 80GB HBM3?"),
    ("gpu: H100 80GB HBM3", "gpu: V9", 'gpu = "V9"', "it has A100-SXM4-40GB, A100"),
    ("gpu: H100 80GB HBM3", "gpu: H100 80GB HBM2", "gpu", "did you mean H100 80GB HBM3?"),
    ("nodes: 64", "nodes: 0", "nodes = 0", "must be at least 1; it is: Nodes that a run may use"),
    ("nodes: 64", "nodes: 64.5", "nodes = 64.5", "must be int"),
    ("nodes: 64", "nodes: true", "nodes = true", "must be int"),
    ("nodes: 64", "nodes: 99999999999999999999", "nodes = 99999999999999999999", "must fit in 64 bits"),
    ("nodes: 64\n", "", "nodes", "is missing; give it: Nodes that a run may use"),
    ("nodes: 64", "nodes: 64\nnode: 64", "node = 64", "unknown key; did you mean nodes?"),
    ("nodes: 64", "nodes: 64\nhost_memory: 1", "host_memory = 1", "did you mean host_memory_gib?"),
    ("nodes: 64", "nodes: 64\nxyz: 1", "xyz = 1", "unknown key; the keys are gpu, nodes"),
    ("gb_per_second: 450", "gb_per_second: .inf", "links.inside_node.gb_per_second", "must be a finite number"),
    ("gb_per_second: 450", "gb_per_second: .nan", "links.inside_node.gb_per_second", "must be a finite number"),
    ("gb_per_second: 450", "gb_per_second: fast", "links.inside_node.gb_per_second", "must be float"),
    ("kind: nvlink", "kind: nvlnk", "links.inside_node.kind", "must be one of nvlink, pcie, infiniband, ethernet; did"),
    ("kind: nvlink", "kind: wire", "links.inside_node.kind", "ethernet; use one of these"),
    ("    latency_us: 3.4\n", "", "links.inside_node.latency_us", "is missing"),
    ("date: 2026-11-27", "date: today", 'price.date = "today"', "is no date; write YYYY-MM-DD"),
    (
        "assumption: whole nodes with InfiniBand, reserved for months",
        "assumption: ''",
        "price.assumption",
        "not be empty",
    ),
    (
        "assumption: whole nodes with InfiniBand, reserved for months",
        "assumption: [a]",
        "price.assumption",
        "must be str",
    ),
    ("dollars_per_gpu_hour: 2.5", "dollars_per_gpu_hour: -1", "price.dollars_per_gpu_hour", "must be at least 0"),
    ("nodes: 64", "nodes: &a 64\nhost: *a", "mine.yaml:4", "invalid YAML: * starts an alias"),
    ("nodes: 64", "nodes: 64\nnodes: 65", "mine.yaml:4", "duplicate key nodes"),
]


@pytest.mark.parametrize(("old", "new", "where", "rule"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, where: str, rule: str) -> None:
    text = EIGHT.read_text()
    assert old in text
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text.replace(old, new, 1))
    (problem,) = caught.value.problems
    assert where in str(problem)
    assert rule in str(problem)
    assert "mine.yaml:" in str(problem)


def section(text: str, name: str, end: str) -> str:
    """A section of the file, up to the line that begins with ``end``."""
    start = text.index(f"{name}:\n")
    return text[start : text.index(f"\n{end}", start) + 1]


@pytest.mark.parametrize(
    ("name", "end", "rule"),
    [
        ("  inside_node", "  between_nodes", "links.inside_node = null"),
        ("  between_nodes", "  host", "links.between_nodes = null"),
        ("  shared", "\n", "storage.shared = null"),
    ],
)
def test_what_several_nodes_or_gpus_need_may_not_be_null(tmp_path: Path, name: str, end: str, rule: str) -> None:
    text = EIGHT.read_text()
    with pytest.raises(ConfigError, match=f"{rule}.*: is needed, as (gpus_per_node is 8|nodes is 64)"):
        load(tmp_path, text.replace(section(text, name, end), f"{name}: null\n"))


def test_a_node_needs_a_disk(tmp_path: Path) -> None:
    text = FILES[0].read_text()
    with pytest.raises(ConfigError, match="storage = null .*has neither local nor shared"):
        load(tmp_path, text.replace(section(text, "  local", "\n"), "  local: null\n"))


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            EIGHT.read_text().replace("nodes: 64", "nodes: no").replace(" gb_per_second: 50\n", " speed: 50\n"),
        )
    assert [problem.path for problem in caught.value.problems] == [
        "nodes",
        "links.between_nodes.speed",
        "links.between_nodes.gb_per_second",
    ]


@pytest.mark.parametrize("text", ["", "[1, 2]", "links"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must be a section; its keys are gpu, nodes"):
        load(tmp_path, text)


def test_a_section_must_be_one(tmp_path: Path) -> None:
    text = EIGHT.read_text()
    with pytest.raises(ConfigError, match="price = 3 .*must be a section; its keys are dollars_per_gpu_hour"):
        load(tmp_path, text.replace(section(text, "price", "\n"), "price: 3\n"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file; those in configs/cluster are: "):
        load_cluster(tmp_path / "none.yaml", PEAK_TFLOPS_BF16)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(tmp_path, PEAK_TFLOPS_BF16)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read .*give a YAML file in UTF-8"):
        load_cluster(tmp_path / "bytes.yaml", PEAK_TFLOPS_BF16)
    with pytest.raises(ConfigError, match="invalid YAML"):
        load(tmp_path, "a: [")


def test_the_table_has_every_key() -> None:
    table = cluster_table()
    assert "| links.inside_node | section or null | null |" in table
    assert "| price.dollars_per_gpu_hour | float | required | at least 0 |" in table
