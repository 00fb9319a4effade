"""The campaign's own judgement: what counts as right, and the table. Needs no SLURM."""

from types import SimpleNamespace

import campaign
import nodes
import pytest
from rows import ROWS


def result(row="sigstop", **changes):
    values = {
        "row": row,
        "zero_stage": 2,
        "repetition": 0,
        "commit": "abc1234",
        "date": "2026-11-26 21:00",
        "problem": None,
        "code": 76,
        "ending": {"code": 76},
        "named": True,
        "said": True,
        "left": [],
        "right": True,
        "lost": 4,
        "noticed": 31.0,
        "ended": 35.0,
        "next": "exit code 0, from step 20",
        "next_seconds": 9.0,
        "next_left": [],
        "ok": True,
    }
    return {**values, **changes}


CASE = SimpleNamespace(codes=(76, 137), ending=None, rank=1, words="")


def test_a_result_as_expected():
    assert campaign.wrong(CASE, result(left=["lease.json"])) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"code": 0}, "exit code 0, not 76 or 137"),
        ({"ending": None}, "ending.json has code None, not 76"),
        ({"ending": {"code": 1}}, "ending.json has code 1, not 76"),
        ({"named": False}, "rank 1 is not named"),
        ({"said": False}, "neither the terminal nor ending.json say ''"),
        ({"left": ["process in state T on n2"]}, "left behind: process in state T on n2"),
        ({"right": False}, "the run did not end as an uninterrupted one: exit code 0, from step 20, []"),
    ],
)
def test_what_is_wrong_is_said(change, complaint):
    assert campaign.wrong(CASE, result(**change)) == [complaint]


def test_the_table_is_written_between_its_marks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# Before\n\n{campaign.BEGIN}\nold\n{campaign.END}\n\nafter\n")
    late = result(repetition=1, noticed=61.0, ended=70.0, lost=9, left=["lease.json"], date="2026-11-26 21:30")
    failed = result("hang", problem="TimeoutError: the end of start3", ok=False)
    campaign.write_table([result(), late, failed], page)
    before, _, rest = page.read_text().partition(campaign.BEGIN)
    table, _, after = rest.partition(campaign.END)
    assert (before, after) == ("# Before\n\n", "\n\nafter\n")
    assert "Commit abc1234, 2026-11-26 21:00 to 2026-11-26 21:30 UTC: 2 of 3 tries as the policy says" in table
    assert "1 of 3 hangs named the right rank within 60 s" in table
    assert (
        "| SIGSTOP | 2 of 2 | 46.0 (61.0) | 52.5 (70.0) | 2 of 2 | lease.json | 9 | 2 of 2 finish, 9.0 (9.0) s |"
        in table
    )
    assert "| hang in Python | 0 of 1 | - | - | - | nothing | - | none needed; 0 of 1 finish |" in table


def test_a_page_without_marks_is_not_changed(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# Nothing\n")
    with pytest.raises(ValueError, match="has no <!-- campaign -->"):
        campaign.write_table([result()], page)
    assert page.read_text() == "# Nothing\n"


def test_rows_are_named_as_on_the_command_line():
    assert {"sigkill", "nan-skip", "disk-log", "usr1-early"} <= ROWS.keys()


def test_why_no_slurm_can_be_started(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert nodes.missing() == "only root can make namespaces"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == "munged" else name)
    assert nodes.missing() == "munged not installed (bash tests/cluster/slurm.sh install)"
