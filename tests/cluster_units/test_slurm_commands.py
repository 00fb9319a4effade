"""Commands of SLURM: those that fail, a controller that does not answer, and what is read from their answers."""

import pytest

from dcscale.cluster.job import slurm
from dcscale.cluster.job.slurm import SlurmError, in_queue, job_number, patient_command, run_command


def test_commands_that_fail():
    with pytest.raises(SlurmError, match="^false: exit code 1$"):
        run_command("false")
    with pytest.raises(SlurmError, match="^no-such-command: .*No such file"):
        run_command("no-such-command")
    assert run_command("echo", "a;b") == "a;b\n"


def test_a_controller_that_does_not_answer_is_asked_again(monkeypatch):
    waits, answers = [], []

    def command(*words):
        if isinstance(answer := answers.pop(0), str):
            return answer
        raise answer

    monkeypatch.setattr(slurm, "run_command", command)
    down = SlurmError("squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    answers[:] = [down, SlurmError("Socket timed out on send/recv operation"), "RUNNING\n"]
    assert patient_command("squeue", sleep=waits.append) == "RUNNING\n"
    assert waits == [5, 10]
    answers[:] = [down] * 5
    with pytest.raises(SlurmError, match="Unable to contact"):
        patient_command("squeue", sleep=waits.append)
    assert (answers, waits[2:]) == ([], [5, 10, 20, 40])
    answers[:] = [SlurmError("squeue: Invalid user id")]
    with pytest.raises(SlurmError, match="Invalid user"):
        patient_command("squeue", sleep=waits.append)
    assert len(waits) == 6


def test_the_number_of_a_submitted_job():
    assert job_number("17\n") == job_number("17;cluster\n") == job_number("--- Welcome, 5 jobs ---\n\n17\n") == "17"
    with pytest.raises(SlurmError, match="no number of a job, but 'Submitted batch job 17 '"):
        job_number("Submitted batch job 17\n")


def test_whether_a_job_is_in_the_queue():
    def gone(*words):
        raise SlurmError("squeue: slurm_load_jobs error: Invalid job id specified")

    def down(*words):
        raise SlurmError("squeue: Unable to contact slurm controller")

    assert in_queue("17", lambda *words: "PENDING\n") == "PENDING"
    assert in_queue("17", lambda *words: "\n") is None
    assert in_queue("17", gone) is None
    with pytest.raises(SlurmError, match="contact"):
        in_queue("17", down)
