"""Whether a job starts again: the decision, the files that it reads and writes, and what SLURM is told."""

import json
from datetime import datetime, timezone

import pytest

from dcscale.cluster import restarts
from dcscale.cluster.job.slurm import Job, SlurmError
from dcscale.cluster.restarts import Action, History, Outcome, decide

VARIABLES = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}
NOW = datetime(2026, 11, 27, 3, 0, 0, tzinfo=timezone.utc)
BEGUN = NOW.timestamp() - 60


def ending(code, **more):
    facts = {"format": 1, "code": code, "reason": "why", "rank": None, "host": None, "job_id": "17"}
    return {**facts, "restart_count": "2", "time": NOW.isoformat(), **more}


# -- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "action", "meant"),
    [
        (0, Action.DONE, 0),
        (1, Action.STOP, 1),
        (2, Action.STOP, 2),
        (3, Action.STOP, 3),
        (75, Action.RESTART, 75),
        (76, Action.RESTART, 76),
        (127, Action.STOP, 127),
        (130, Action.STOP, 130),
        *((code, Action.RESTART, 76) for code in (134, 135, 137, 138, 139, 142, 143)),
        (255, Action.STOP, 255),
    ],
)
def test_the_code_of_srun_where_there_is_no_ending(code, action, meant):
    decision = decide(Outcome(code, None, 10), History("17", 5))
    assert (decision.action, decision.code) == (action, meant)
    assert f"srun ended with {code}" in decision.reason


@pytest.mark.parametrize("srun", [0, 1, 75, 137, 143])
@pytest.mark.parametrize(
    ("code", "action"),
    [(0, Action.DONE), (1, Action.STOP), (3, Action.STOP), (75, Action.RESTART), (76, Action.RESTART)],
)
def test_the_ending_decides(srun, code, action):
    decision = decide(Outcome(srun, ending(code, rank=1, host="n2"), 10), History("17", 5))
    assert (decision.action, decision.code, decision.reason) == (action, code, "why (rank 1 on n2)")


def test_no_limit_while_checkpoints_grow():
    history = History("17")
    for start in range(1, 101):
        decision = decide(Outcome(75, ending(75), 10 * start), history)
        assert (decision.action, decision.wait) == (Action.RESTART, 0)
        history = decision.history
    assert (history.restarts, history.without_progress, history.step) == (100, 0, 1000)


@pytest.mark.parametrize("code", [75, 76])
def test_starts_without_progress_wait_longer_and_longer_and_end(code):
    history, waits = History("17", step=10), []
    for _ in range(restarts.MOST_WITHOUT_PROGRESS - 1):
        decision = decide(Outcome(code, ending(code), 10), history)
        assert decision.action is Action.RESTART
        history = decision.history
        waits.append(decision.wait)
    assert waits == [0, 30, 60, 120, 240, 480, 960]
    decision = decide(Outcome(code, ending(code), 10), history)
    assert (decision.action, decision.code) == (Action.STOP, code)
    assert "8 starts in a row have ended without a newer checkpoint than that of step 10" in decision.reason
    # One that makes progress is all it takes.
    assert decide(Outcome(code, ending(code), 11), history).history.without_progress == 0


def test_a_new_job_counts_from_0_but_knows_how_far_the_run_was():
    old = History("16", 40, restarts=9, without_progress=7, faults=("n1",), excluded={"n3": "bad"})
    assert old.of_job("17") == History("17", 40)
    assert old.of_job("16") is old


def test_what_slurm_ends_is_not_restarted():
    decision = decide(Outcome(143, ending(75), 10, ended_by_slurm="cancelled"), History("17"))
    assert (decision.action, decision.code, decision.reason) == (Action.STOP, 75, "why; cancelled")
    assert decide(Outcome(0, ending(0), 10, ended_by_slurm="cancelled"), History("17")).action is Action.DONE


def test_a_host_at_fault_again_is_excluded():
    history, hosts = History("17"), ["n1", None, "n2", "n1"]
    for number, host in enumerate(hosts):
        assert history.excluded == {}
        history = decide(Outcome(76, ending(76, rank=0, host=host), number + 1), history).history
    assert history.excluded == {"n1": "the cause of 2 of the last 4 failures"}
    assert history.faults == ("n1", None, "n2", "n1")


def test_a_host_at_fault_long_ago_is_not():
    history = History("17")
    for number, host in enumerate(["n1", "n2", "n3", "n4", "n5", "n1"]):
        history = decide(Outcome(76, ending(76, rank=0, host=host), number + 1), history).history
    assert history.excluded == {}


def test_stops_by_request_are_nobody_s_fault():
    history = History("17")
    for number in range(3):
        history = decide(Outcome(75, ending(75, rank=0, host="n1"), number + 1), history).history
    assert (history.faults, history.excluded) == ((), {})


def test_a_node_that_failed_its_check_is_excluded_at_once():
    decision = decide(Outcome(76, None, 0, bad_nodes={"n2": "its check failed: ECC"}), History("17"))
    assert decision.history.excluded == {"n2": "its check failed: ECC"}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


def add_checkpoint(run, step, complete=True):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir()
    if complete:
        (folder / "COMPLETE").write_text("{}")


def test_the_newest_complete_checkpoint(run):
    assert restarts.newest_step(run) == 0
    add_checkpoint(run, 8)
    add_checkpoint(run, 16)
    add_checkpoint(run, 24, complete=False)
    (run / "checkpoints" / ".unfinished-step-00000032").mkdir()
    (run / "checkpoints" / ".unfinished-step-00000032" / "COMPLETE").write_text("{}")
    assert restarts.newest_step(run) == 16


def read(run, content, started=BEGUN, variables=VARIABLES):
    (run / "ending.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return restarts.read_ending(run, started, variables)


def test_the_ending_of_this_start(run):
    assert restarts.read_ending(run, 0, VARIABLES) is None
    assert read(run, ending(75)) == ending(75)
    assert read(run, ending(75), started=NOW.timestamp() + 0.9) == ending(75)  # of that second
    assert read(run, ending(75), started=NOW.timestamp() + 250) == ending(75)  # clocks differ a little
    first = ending(75, restart_count=None)
    assert read(run, first, variables={"SLURM_JOB_ID": "17"}) == first


@pytest.mark.parametrize(
    "change", [{"job_id": "16"}, {"job_id": None}, {"restart_count": "1"}, {"restart_count": None}]
)
def test_the_ending_of_another_start(run, change):
    assert read(run, ending(75, **change)) is None


def test_the_ending_of_a_job_with_the_same_number_long_ago(run):
    assert read(run, ending(75), started=NOW.timestamp() + 3600) is None


def test_without_slurm_the_time_decides(run):
    content = ending(75, job_id=None, restart_count=None)
    assert read(run, content, NOW.timestamp() - 1, {}) == content
    assert read(run, content, NOW.timestamp() + 2, {}) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        (ending(75, format=2), "has format 2 and code 75"),
        (ending(4), "has format 1 and code 4"),
        (ending("75"), "code '75'"),
        (ending([]), "code []"),
        (ending(True), "code True"),
        (ending(75, time="noon"), "has the time 'noon'"),
        (ending(75, time=None), "has the time None"),
        (ending(75, time=7), "has the time 7"),
    ],
)
def test_a_malformed_ending_is_described(run, content, message):
    with pytest.raises(ValueError, match=r"ending\.json .*") as caught:
        read(run, content)
    assert message in str(caught.value)


def test_the_history_is_read_back(run):
    assert restarts.read_history(run) == History()
    history = History("17", 30, 4, 1, ("n1", None), {"n3": "its check failed"})
    decision = restarts.Decision(Action.RESTART, 76, "a hang", history, wait=30)
    restarts.write_history(run, decision, NOW)
    assert restarts.read_history(run) == history
    assert json.loads((run / "restarts.json").read_text())["last"] == {
        "time": "2026-11-27T03:00:00+00:00",
        "action": "restart",
        "code": 76,
        "reason": "a hang",
        "wait_seconds": 30,
    }
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "restarts.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2: it must be 1"),
        ({"job_id": 17}, "has job_id 17: it must be text"),
        ({"step": -1}, "has step -1: it must be a number of 0 or more"),
        ({"restarts": True}, "has restarts True"),
        ({"without_progress": None}, "has without_progress None"),
        ({"faults": "n1"}, "must be a list of hosts or null"),
        ({"faults": ["n1 ExcNodeList=n2"]}, "must be a list of hosts or null"),
        ({"excluded": ["n1"]}, "must map hosts to reasons"),
        ({"excluded": {"n1,n2": "x"}}, "must map hosts to reasons"),
    ],
)
def test_a_malformed_history_is_described(run, change, message):
    restarts.write_history(run, restarts.Decision(Action.STOP, 1, "", History("17")), NOW)
    path = run / "restarts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"restarts\.json") as caught:
        restarts.read_history(run)
    assert message in str(caught.value)


def test_bad_nodes_of_this_start_only(run):
    warnings = []
    restarts.report_bad_node(run, "n1", "ECC\nerrors", VARIABLES)
    restarts.report_bad_node(run, "n2", "old", {**VARIABLES, "SLURM_RESTART_COUNT": "1"})
    (run / "bad_nodes" / "x.json").write_text(json.dumps({"format": 1, "host": "n3 Nice=0"}))
    assert restarts.read_bad_nodes(run, VARIABLES, warnings.append) == {"n1": "its check failed: ECC errors"}
    assert len(warnings) == 1
    assert "must have format 1 and the name of a host" in warnings[0]


# -- SLURM ------------------------------------------------------------------------------------------------------------


class Slurm:
    """Stands for SLURM's commands; notes those that change something."""

    def __init__(self, job="RUNNING;None;main;2;(null);(null);(null)", nodes=("n1", "n2", "n3", "n4")):
        self.job, self.nodes, self.changes = job, [f"{name};idle;(null)" for name in nodes], []
        self.broken = ()

    def __call__(self, *words):
        if words[:2] in self.broken or words[:1] in self.broken:
            raise SlurmError(f"{' '.join(words[:2])}: no")
        if words[0] == "squeue":
            return self.job + "\n"
        if words[0] == "sinfo":
            return "\n".join(self.nodes) + "\n"
        if words[:3] == ("scontrol", "show", "hostnames"):
            return words[3].replace(",", "\n")
        self.changes.append(words)
        return ""


def act(run, slurm, code=76, variables=VARIABLES):
    return restarts.act(run, code, NOW.timestamp(), variables, slurm)


def test_a_start_with_progress_is_requeued_at_once(run, capsys):
    add_checkpoint(run, 8)
    slurm = Slurm()
    assert act(run, slurm) == 0
    assert slurm.changes == [("scontrol", "requeue", "17")]
    assert "restart    job 17: srun ended with 76\n" in capsys.readouterr().out


def test_a_second_one_without_progress_waits_but_not_on_its_nodes(run, capsys):
    assert act(run, Slurm()) == 0
    slurm = Slurm()
    assert act(run, slurm) == 0
    assert slurm.changes == [("scontrol", "requeue", "17"), ("scontrol", "update", "JobId=17", "StartTime=now+30")]
    assert "job 17, in 30 s: srun ended with 76; start 2 of 8 without a newer checkpoint" in capsys.readouterr().out


def test_the_last_task_of_an_array_does_not_requeue_all_of_it(run):
    add_checkpoint(run, 8)
    slurm = Slurm()
    act(run, slurm, variables={**VARIABLES, "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"})
    assert slurm.changes == [("scontrol", "requeue", "17_3")]


def test_nodes_are_excluded_besides_those_of_the_user(run, capsys):
    add_checkpoint(run, 8)
    restarts.report_bad_node(run, "n2", "ECC", VARIABLES)
    slurm = Slurm("RUNNING;None;main;2;(null);(null);n4")
    assert act(run, slurm) == 0
    assert slurm.changes[1:] == [("scontrol", "update", "JobId=17", "ExcNodeList=n4,n2")]
    assert "node       n2 is excluded: its check failed: ECC" in capsys.readouterr().out
    again = Slurm("RUNNING;None;main;2;(null);(null);n4,n2")
    add_checkpoint(run, 16)
    assert act(run, again) == 0
    assert again.changes == [("scontrol", "requeue", "17")]  # they stay excluded


@pytest.mark.parametrize(
    ("job", "nodes", "why"),
    [
        (
            "RUNNING;None;main;2;(null);(null);(null)",
            ["n1", "n2"],
            "the job needs 2 of the nodes in main, of which 2 can be used",
        ),
        ("RUNNING;None;main;2;n[1-2];(null);(null)", ["n1", "n2", "n3"], "the job asks for n[1-2]"),
        (
            "RUNNING;None;main;2;(null);a|b;(null)",
            ["n1", "n2", "n3"],
            "which nodes fit the constraint a|b is not known",
        ),
    ],
)
def test_the_job_is_never_left_without_nodes(run, capsys, job, nodes, why):
    add_checkpoint(run, 8)
    restarts.report_bad_node(run, "n2", "ECC", VARIABLES)
    slurm = Slurm(job, nodes)
    assert act(run, slurm) == 0
    assert slurm.changes == [("scontrol", "requeue", "17")]
    assert f"node       n2 would be excluded, but {why}: its check failed: ECC" in capsys.readouterr().out


def test_nodes_that_are_down_or_do_not_fit_are_no_substitute():
    slurm = Slurm("RUNNING;None;main;1;(null);h100;(null)")
    slurm.nodes = ["n1;mixed;h100,ib", "n2;down*;h100", "n3;idle*;h100", "n4;idle;a100", "n5;drained;h100"]
    job = Job(VARIABLES, slurm)
    why = "the job needs 1 of the nodes in main, of which 1 can be used"
    assert job.excludable(["n1"]) == ([], {"n1": why})
    assert job.excludable(["n2", "n1"]) == (["n2"], {"n1": why})
    slurm.nodes.append("n6;idle~;h100")
    assert job.excludable(["n1.lab.org", "n6", "x1"]) == (
        ["n1"],
        {"n6": "the job needs 1 of the nodes in main, of which 2 can be used", "x1": "main has no node of this name"},
    )


@pytest.mark.parametrize(
    ("state", "ended"),
    [("RUNNING;None", False), ("SIGNALING;None", False), ("COMPLETING;TimeLimit", False), ("COMPLETING;None", True)],
)
def test_which_starts_slurm_ends_itself(run, capsys, state, ended):
    add_checkpoint(run, 8)
    slurm = Slurm(f"{state};main;2;(null);(null);(null)")
    assert act(run, slurm, 143) == (76 if ended else 0)
    assert bool(slurm.changes) is not ended
    assert ("as after scancel" in capsys.readouterr().out) is ended


def test_done_and_stop_change_nothing(run, capsys):
    for code in (0, 2):
        slurm = Slurm()
        assert act(run, slurm, code) == code
        assert slurm.changes == []
    assert "done       srun ended with 0; exit code 0\n" in (out := capsys.readouterr().out)
    assert "stopped    srun ended with 2; exit code 2\n" in out


def test_if_slurm_cannot_be_asked(run, capsys):
    slurm = Slurm()
    slurm.broken = (("squeue",),)
    assert act(run, slurm) == 76
    assert act(run, slurm, 0) == 0
    assert act(run, Slurm("gibberish")) == 76
    assert act(run, Slurm(), variables={}) == 76
    out = capsys.readouterr().out
    assert "SLURM cannot be asked (squeue --noheader: no), so the job is not started again" in out
    assert "its answer is not as expected: 'gibberish '" in out
    assert "SLURM_JOB_ID is not set" in out


def test_if_slurm_does_not_requeue(run, capsys):
    slurm = Slurm()
    slurm.broken = (("scontrol", "requeue"),)
    assert act(run, slurm) == 76
    assert (
        "stopped    srun ended with 76; the job cannot be started again: scontrol requeue: no; exit code 76"
        in capsys.readouterr().out
    )
    last = json.loads((run / "restarts.json").read_text())["last"]
    assert (last["action"], last["code"]) == ("stop", 76)


def test_a_job_that_is_cancelled_meanwhile_is_not_requeued(run, capsys):
    class Cancelled(Slurm):
        def __call__(self, *words):
            answer = super().__call__(*words)
            if words[0] == "squeue":
                self.job = self.job.replace("RUNNING", "COMPLETING")
            return answer

    slurm = Cancelled()
    assert act(run, slurm) == 76
    assert slurm.changes == []
    assert "SLURM has ended the job itself (COMPLETING), as after scancel" in capsys.readouterr().out


def test_if_slurm_does_not_say_which_nodes_there_are(run, capsys):
    add_checkpoint(run, 8)
    restarts.report_bad_node(run, "n2", "ECC", VARIABLES)
    slurm = Slurm()
    slurm.broken = (("sinfo",),)
    assert act(run, slurm) == 0
    assert slurm.changes == [("scontrol", "requeue", "17")]
    assert "warning    no node is excluded, since SLURM does not say" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_read_are_no_progress(run, capsys, monkeypatch):
    def fail(run):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(restarts, "newest_step", fail)
    assert act(run, Slurm()) == 0
    assert "checkpoints cannot be read (Stale file handle): counted as no progress" in capsys.readouterr().out
    assert restarts.read_history(run).without_progress == 1


def test_if_slurm_refuses_the_delay(run, capsys):
    slurm = Slurm()
    slurm.broken = (("scontrol", "update"),)
    assert [act(run, slurm) for _ in range(2)] == [0, 0]
    assert (
        "warning    the job starts again, but at once and on any node: scontrol update: no" in capsys.readouterr().out
    )


def test_malformed_files_are_reported_and_not_used(run, capsys):
    add_checkpoint(run, 8)
    (run / "ending.json").write_text("{")
    (run / "restarts.json").write_text("[]")
    assert act(run, Slurm(), 75) == 0
    out = capsys.readouterr().out
    assert "is not JSON" in out
    assert "srun's exit code decides" in out
    assert "must be a JSON object" in out
    assert restarts.read_history(run) == History("17", 8, 1)


def test_without_a_count_it_does_not_start_again(run, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(restarts, "write_json", full)
    slurm = Slurm()
    assert act(run, slurm) == 76
    assert slurm.changes == []
    assert "restarts.json cannot be written: No space left on device" in capsys.readouterr().out
    assert act(run, slurm, 0) == 0


# -- program ----------------------------------------------------------------------------------------------------------


def test_the_run_folder_is_given_or_in_the_config(tmp_path, capsys):
    config = tmp_path / "a.yaml"
    config.write_text(f"run: {{folder: {tmp_path}/run}}\n")
    common = ["--code=2", f"--started={NOW.timestamp()}"]
    assert restarts.main([str(config), "train.steps=7", *common], VARIABLES, Slurm()) == 2
    assert json.loads((tmp_path / "run" / "restarts.json").read_text())["last"]["action"] == "stop"
    assert restarts.main([str(tmp_path / "run"), *common], VARIABLES, Slurm()) == 2
    assert restarts.main([str(tmp_path / "none.yaml"), *common], VARIABLES, Slurm()) == 2
    assert "stopped    srun ended with 2; the config names no run folder" in capsys.readouterr().out
