"""What a person sees at the terminal."""

from dcscale.observe import Console


def test_lines_only_where_enabled(capsys):
    Console(enabled=True).line("seen")
    Console(enabled=False).line("not seen")
    assert capsys.readouterr().out == "seen\n"


def test_without_a_terminal_progress_is_lines_with_facts_and_time_left(capsys):
    progress = Console().progress(total=10, done=4, unit="step")
    progress.show(5, {"loss": "2.5"})
    progress.show(6, {"loss": "2.4"})  # too soon after the last line
    progress.show(10, {"loss": "2.0"})  # the end is always shown
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 5/10 | loss 2.5 | ")
    assert lines[0].endswith("left")
    assert lines[1].startswith("step 10/10 | loss 2.0 | 00:00 left")


def test_a_silent_rank_shows_no_progress(capsys):
    progress = Console(enabled=False).progress(total=2, done=0, unit="step")
    progress.show(2, {})
    progress.close()
    assert capsys.readouterr().out == ""
