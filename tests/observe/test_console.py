"""Lines and progress on the terminal."""

import io
import re
import sys
import time

import pytest

from dcscale.observe import Console, Progress, printable


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_only_if_enabled(capsys):
    Console(enabled=True).line("seen")
    Console(enabled=False).line("not seen")
    assert capsys.readouterr().out == "seen\n"


def test_without_a_terminal_progress_is_lines_with_values_and_time_left(capsys):
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


def test_the_lines_go_to_the_given_file(capsys):
    Progress(total=10, done=0, unit="token", file=sys.stderr).show(10, {})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("token 10/10 | ")


def test_a_terminal_shows_a_bar_with_values_and_time_left(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Console().progress(total=1000, done=4, unit="step")
    time.sleep(0.15)  # the bar is drawn at most ten times per second
    progress.show(5, {"loss": "2.5000", "tok/s": "1,234"})
    progress.close()
    shown = terminal.getvalue()
    assert "| 4/1000 [00:00<?, ?step/s]" in shown  # the time left is not known yet
    bar = re.search(r"\| 5/1000 \[00:0\d<((?:\d+:)?\d\d:\d\d), .*, loss=2\.5000, tok/s=1,234\]", shown)
    assert bar
    assert bar[1] > "02:00"  # 995 steps of at least 0.15 s
    assert capsys.readouterr().out == ""  # no lines besides the bar


def test_a_line_goes_above_the_bar(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    progress = console.progress(total=10, done=4, unit="step")
    console.line("step 4: validation loss")
    progress.close()
    assert capsys.readouterr().out == "step 4: validation loss\n"
    assert terminal.getvalue().count("4/10") == 3  # at the start, below the line, and at the end


@pytest.mark.parametrize("terminal", [io.StringIO, Terminal])
def test_a_silent_rank_shows_no_progress(monkeypatch, capsys, terminal):
    stderr = terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Console(enabled=False).progress(total=2, done=0, unit="step")
    progress.show(2, {})
    progress.close()
    assert capsys.readouterr().out == stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("def f(x):\n\treturn 'äö € 🙂 \ufffd'", "def f(x):\n\treturn 'äö € 🙂 \ufffd'"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\r\n\x00\x08\x7f", "\\r\n\\x00\\x08\\x7f"),
        ("\x9b2J\x85", "\\x9b2J\\x85"),  # one-character forms of escape sequences
        ("a\\x1b", "a\\x1b"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown
