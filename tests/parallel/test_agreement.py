"""Ranks with another config or other code do not train together, and say in what they differ."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dcscale.config import Config
from dcscale.config.schema.data import DataSource
from dcscale.parallel import ArrivalError, DisagreementError, Environment
from dcscale.parallel.agreement import check_agreement, start_facts
from dcscale.parallel.rendezvous import Rendezvous, join
from dcscale.provenance import ROOT, versions

FACTS = {"model.dim": "64", "version of torch": "2.13.0", "source dcscale/cli.py": "SHA-256 0123"}


@pytest.fixture
def meeting():
    return join(Environment(0, 0, 1, 1, torch.device("cpu")), 1, print)


def compare(meeting, facts_by_rank, world_sizes=None, seconds=30.0):
    """The error of each rank in ``facts_by_rank``, None if it agrees; two ranks a host."""
    world_sizes = world_sizes or [len(facts_by_rank)] * len(facts_by_rank)
    hosts = tuple(f"n{rank // 2 + 1}" for rank in range(max(world_sizes)))

    def call(rank, facts):
        own = Rendezvous(meeting.new_store_client(30), hosts, meeting.address, meeting.prefix)
        environment = Environment(rank, rank, world_sizes[rank], world_sizes[rank], torch.device("cpu"))
        try:
            return check_agreement(own, environment, facts, seconds=seconds)
        except (ArrivalError, DisagreementError) as error:
            return error

    with ThreadPoolExecutor(len(facts_by_rank)) as threads:
        return list(threads.map(call, facts_by_rank, facts_by_rank.values()))


def test_ranks_that_agree_continue(meeting):
    assert compare(meeting, {0: FACTS, 1: FACTS, 2: FACTS}) == [None] * 3


def test_a_single_rank_agrees_with_itself(meeting):
    assert compare(meeting, {0: FACTS}) == [None]


def test_all_ranks_name_ranks_hosts_and_keys_that_differ(meeting):
    other = {**FACTS, "model.dim": "96"}
    more = {**other, "version of torch": "2.12.0", "model.new": "true"}
    del more["source dcscale/cli.py"]
    errors = compare(meeting, {0: FACTS, 1: other, 2: FACTS, 3: other, 4: more})
    assert {type(error) for error in errors} == {DisagreementError}
    assert [error.from_rank0 for error in errors] == [False, True, True, True, True]  # so rank 0 alone prints it
    assert {str(error) for error in errors} == {
        "the ranks of this run have different configs or code:\n"
        "  model.dim is 96 on ranks 1 (n1), 3 (n2), 4 (n3), but 64 on rank 0 (n1)\n"
        "  version of torch is 2.12.0 on rank 4 (n3), but 2.13.0 on rank 0 (n1)\n"
        "  model.new is true on rank 4 (n3), but absent on rank 0 (n1)\n"
        "  source dcscale/cli.py is absent on rank 4 (n3), but SHA-256 0123 on rank 0 (n1)\n"
        "start all of them with the same arguments, from the same checkout and environment"
    }


def test_many_differences_are_counted(meeting):
    facts = {f"key{number}": "1" for number in range(13)}
    [error, _] = compare(meeting, {0: facts, 1: dict.fromkeys(facts, "2")})
    assert str(error).count("\n  key") == 10
    assert "\n  and 3 more differences\n" in str(error)


def test_ranks_that_count_differently_do_not_train_together(meeting):
    errors = compare(meeting, {0: FACTS, 1: FACTS}, world_sizes=[2, 3])
    assert all("\n  number of ranks is 3 on rank 1 (n1), but 2 on rank 0 (n1)\n" in str(error) for error in errors)


def test_a_rank_that_falls_silent_is_named(meeting):
    [error] = compare(meeting, {0: FACTS}, [4], seconds=0.1)
    assert isinstance(error, ArrivalError)
    assert str(error) == "ranks 1 (n1), 2-3 (n2) arrived, but did not compare configs and code within 0.1 s"


def test_rank_0_that_falls_silent_is_named(meeting):
    [error] = compare(meeting, {1: FACTS}, [2, 2], seconds=0.1)
    assert isinstance(error, ArrivalError)
    assert str(error) == "rank 0 (n1) arrived, but did not compare configs and code"


# -- what must be the same -------------------------------------------------------------------------------------------


def test_settings_are_compared_under_their_keys():
    config = Config()
    config.data.sources = [DataSource("a", "x", 1.0), DataSource("b", "y", 2.0)]
    facts = start_facts(config)
    assert facts["model.dim"] == str(config.model.dim)
    assert facts["model.windows"] == json.dumps(config.model.windows)
    assert (facts["data.sources[1].path"], facts["data.sources[1].weight"]) == ('"y"', "2.0")
    assert not [key for key in start_facts() if key.startswith("data.")]


def test_a_cache_on_a_local_disk_may_be_elsewhere_on_each_host():
    config = Config()
    config.data.cache = "/tmp/job17.n1/cache"
    assert "data.cache" not in start_facts(config)
    assert "data.cache_bytes" in start_facts(config)


def test_credentials_are_compared_but_not_shown():
    def fact(train):
        config = Config()
        config.data.train = train
        return start_facts(config)["data.train"]

    assert fact("s3://bucket/train") == '"s3://bucket/train"'
    secrets = ["https://me:hunter2@host/train", "https://me:hunter3@host/train", "https://host/train?signature=hunter2"]
    shown = [fact(secret) for secret in secrets]
    assert len(set(shown)) == 3
    assert not any("hunter" in text or "host" in text for text in shown)
    assert all(text.startswith("(not shown, SHA-256 ") for text in shown)


def test_libraries_are_compared():
    facts = start_facts()
    assert {f"version of {name}": version for name, version in versions().items()}.items() <= facts.items()
    assert {"dcscale", "python", "torch", "deepspeed", "numpy"} <= versions().keys()


def test_every_source_file_is_compared(tmp_path):
    for name in ("dcscale/config/load.py", "dcscale/cli.py", "launch/train.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = start_facts(root=tmp_path)
    sources = [key for key in before if key.startswith("source ")]
    assert sources == ["source dcscale/cli.py", "source dcscale/config/load.py", "source launch/train.py"]
    (tmp_path / "launch" / "train.py").write_text("changed = True\n")
    (tmp_path / "dcscale" / "new.py").write_text("")
    after = start_facts(root=tmp_path)
    assert {key for key in after if after[key] != before.get(key)} == {
        "source launch/train.py",
        "source dcscale/new.py",
    }
