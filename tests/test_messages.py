"""What programs say besides their results: how far they are and how long it takes, in a terminal and in a file."""

import io
import sys

import pytest

from hf_relpos import messages
from hf_relpos.messages import Progress, say_command, this_command, time_text


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(messages, "time", found)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds, text", [(1.2, "2 s"), (61, "61 s"), (125, "3 min"), (7200, "2.0 h")])
def test_times_in_words(seconds, text):
    assert time_text(seconds) == text


def test_a_file_gets_the_time_and_a_line_every_half_minute(clock, capsys):
    with Progress(100, "windows of 1,024 tokens", "evaluating", "--max_windows {}".format, long=60) as progress:
        for index in range(100):
            clock.now += 60 if index == 0 else 2  # the first one warms up
            progress.update(1, lambda: "loss 3.2")
    lines = capsys.readouterr().err.splitlines()
    # nobody waits for the second where the first takes a minute
    first, *lines = lines
    assert first == (
        "about 99 min for 99 more windows of 1,024 tokens, at the speed of the first one, which may be slower than the "
        "others; --max_windows 1 takes 60 s"
    ).replace("99 min", "1.6 h")
    # 97 are left after three, at 2 s each; 60 s suffice for 30
    assert lines[0] == (
        "about 4 min for 97 more windows of 1,024 tokens, at the speed of the first ones; --max_windows 30 takes 60 s"
    )
    assert lines[1] == "evaluating: 18/100 windows, loss 3.2, about 3 min left"
    assert lines[-1] == "evaluating: 100/100 windows in 5 min" and len(lines) == 2 + 5 + 1


def test_what_was_something_else_is_left_out(clock, capsys):
    progress = Progress(20, "steps", "training", file=None)
    for index in range(20):
        clock.now += 2
        progress.update()
        if index % 5 == 4:
            clock.now += 100
            progress.leave_out(100)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("about 34 s for 17 more steps") and lines[-1] == "training: 20/20 steps in 40 s"


def test_what_is_short_says_nothing_in_a_file(clock, capsys):
    with Progress(3, "prompts", "generating") as progress:
        for _ in range(3):
            clock.now += 1
            progress.update()
    assert capsys.readouterr() == ("", "")


def test_nothing_shorter_is_offered_where_it_does_not_take_long(clock, capsys):
    progress = Progress(10, "steps", "training", "--max_steps {}".format)
    for _ in range(5):
        clock.now += 2
        progress.update()
    assert capsys.readouterr().err == "about 14 s for 7 more steps, at the speed of the first ones\n"


def test_what_was_done_before_and_what_comes_besides_count(clock, capsys):
    progress = Progress(110, "steps", "training", initial=100, extra=lambda seconds: 5 * seconds, only_time=True)
    for _ in range(10):
        clock.now += 40
        progress.update()
    progress.close()
    by_the_first = "about 10 min for 9 more steps, at the speed of the first one, which may be slower than the others"
    assert capsys.readouterr().err.splitlines() == [
        by_the_first,
        "about 9 min for 8 more steps, at the speed of the first ones",
    ]


@pytest.mark.parametrize(
    "total, first, extra, said",
    [
        (3, 120, 0, "about 4 min for 2 more steps"),
        (1, 4, 10, "about 40 s for what comes after them"),  # one step, and an evaluation that takes ten
        (3, 1, 60, "about 62 s for 2 more steps"),
        (1, 4, 5, None),
        (3, 1, 0, None),
        (10_000, 5, 100, None),  # told by those after it
    ],
)
def test_a_short_run_says_its_time_after_the_first_step(total, first, extra, said, clock, capsys):
    progress = Progress(total, "steps", "training", extra=lambda seconds: extra * seconds)
    clock.now += first
    progress.update()
    printed = capsys.readouterr().err
    assert printed.startswith(f"{said}, at the speed of the first one") if said else not printed


def test_a_terminal_gets_a_bar_with_the_last_loss(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(20, "steps", "training") as progress:
        for _ in range(20):
            clock.now += 2
            progress.update(1, lambda: "loss 3.2")
        progress.bar.refresh()
    assert "\r" in terminal.getvalue() and "20/20" in terminal.getvalue() and "loss 3.2" in terminal.getvalue()
    assert "about 34 s for 17 more steps" in terminal.getvalue()


@pytest.mark.parametrize("has_terminal", [False, True])
def test_other_processes_are_silent(has_terminal, clock, monkeypatch):
    stream = Terminal() if has_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", "1")
    with Progress(20, "steps", "training") as progress:
        for _ in range(20):
            clock.now += 40
            progress.update(1, lambda: pytest.fail("nobody reads this"))
    say_command(["hf-relpos", "schemes"])
    assert stream.getvalue() == ""


def test_this_command_with_other_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-relpos push", "a b", "me/x", "--dry_run", "true", "--private", "true"])
    sys.argv += ["--output_dir", "hub"]
    assert this_command(["--dry_run", "--output_dir"]) == ["hf-relpos", "push", "a b", "me/x", "--private", "true"]
    monkeypatch.setattr(sys, "argv", ["hf-relpos push", "a", "me/x", "--dry-run", "--output-dir=hub", "--private"])
    assert this_command(["--dry_run", "--output_dir"]) == ["hf-relpos", "push", "a", "me/x", "--private"]
    again = ["--resume_from_checkpoint", "last"]
    for given in (["--resume_from_checkpoint=last"], ["--resume_from_checkpoint", "out/checkpoint-3"], []):
        monkeypatch.setattr(sys, "argv", ["hf-relpos train", *given, "--output_dir", "out"])
        assert this_command(again[:1], *again) == ["hf-relpos", "train", "--output_dir", "out", *again]
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--output_dir", "out"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "scripts/train.py", "--output_dir", "out"])
    assert this_command(again[:1], *again) == ["python3", "scripts/train.py", "--output_dir", "out", *again]
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "scripts/train.py"])
    assert this_command(again[:1]) == ["python3", "scripts/train.py"]


def test_a_path_is_said_without_empty_parts(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").touch()
    say_command(["hf-relpos", "check", "a//b.py", "--prompt", "x // y", "https://a//b"])
    assert capsys.readouterr().err == "next: hf-relpos check a/b.py --prompt 'x // y' https://a//b\n"
