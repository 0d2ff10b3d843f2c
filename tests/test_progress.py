"""What a command says while it works: how far a step is, and how long it takes."""

import functools
import io
import types

import numpy as np
import pytest

from defence.base import progress
from defence.base.text import format_duration
from defence.net import training


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch):
    """Another test of the same process may have been quiet."""
    monkeypatch.setattr(progress, "_quiet", False)


def work(clock, capsys, parts, total=100, promise="", times=1):
    """Work through parts, (units, seconds), and return the lines printed, with the time of each."""
    lines, start = [], clock.now
    with progress.follow("harden", total, promise, clock, times) as advance:
        for units, seconds in parts:
            clock.now += seconds
            advance(units)
            lines += [(clock.now - start, line) for line in capsys.readouterr().err.splitlines()]
    return lines


def test_a_long_step_says_every_30_seconds_what_is_done_and_left(capsys):
    lines = work(Clock(), capsys, [(1, 10)] * 100)
    assert [seconds for seconds, _ in lines] == list(range(30, 1000, 30))
    assert lines[:2] == [
        (30, "harden: 3 %, about 16 minutes left"),
        (60, "harden: 6 %, about 16 minutes left"),
    ]
    assert lines[-1] == (990, "harden: 99 %, about 10 seconds left")


def test_a_short_step_and_the_end_of_a_step_say_nothing(capsys):
    assert work(Clock(), capsys, [(1, 0.09)] * 100) == []
    assert work(Clock(), capsys, [(100, 40)]) == []


@pytest.mark.parametrize("seconds", [0.06, 0.5])
def test_a_step_of_over_10_seconds_says_after_20_parts_how_long_it_takes(capsys, seconds):
    """Also under a pipe. The first part, in which a net is compiled, does not count."""
    (when, line), *_ = work(Clock(), capsys, [(1, 4), *[(1, seconds)] * 999], 1000)
    assert when == pytest.approx(4 + max(1, 20 * seconds), abs=seconds)
    left = format_duration(1000 * seconds - when + 4)
    assert line == f"harden: 2 %, about {left} left"


def test_of_several_short_steps_one_says_how_far_it_is(capsys, monkeypatch):
    clock = Clock()
    clock.now = 120.0
    monkeypatch.setattr(progress, "_printed", 100.0)
    assert work(clock, capsys, [(10, 2)] * 10) == [(10, "harden: 50 %, about 10 seconds left")]


def test_what_an_earlier_command_printed_does_not_count(capsys, monkeypatch):
    clock = Clock()
    clock.now = 1000.0
    monkeypatch.setattr(progress, "_printed", 1.0)
    progress.set_quiet(False)
    assert work(clock, capsys, [(10, 2)] * 10) == []


def test_parts_of_a_step_may_be_long_and_the_first_one_longer(capsys):
    assert work(Clock(), capsys, [(10, 60), (40, 40), (50, 50)]) == [
        (60, "harden: 10 %, about 9 minutes left"),
        (100, "harden: 50 %, about 50 seconds left"),
    ]


def test_a_step_of_unknown_length_says_what_is_done(capsys):
    assert work(Clock(), capsys, [(1, 20)] * 3, total=0) == [(40, "harden: 2 done")]


@pytest.mark.parametrize(("seconds", "expected"), [(0.06, "60 seconds"), (0.6, "10 minutes")])
def test_a_promise_is_made_once_and_soon(capsys, seconds, expected):
    """The first step, in which the net is compiled, does not count."""
    steps = [(64, 4), *[(64, seconds)] * 999]
    lines = work(Clock(), capsys, steps, 64_000, "hardening takes about {} (1,000 steps)")
    ((when, line),) = [line for line in lines if "hardening" in line[1]]
    assert line == f"hardening takes about {expected} (1,000 steps)"
    assert when == pytest.approx(4 + max(1, 20 * seconds), abs=seconds)


def test_a_promise_may_be_about_later_steps_too(capsys):
    lines = work(Clock(), capsys, [(1, 0.2)] * 100, 100, "the scan takes about {}", times=7)
    assert [line for _, line in lines] == ["the scan takes about 2 minutes"]


def test_no_promise_is_made_of_a_short_step(capsys):
    assert work(Clock(), capsys, [(1, 0.3)] * 29, 29, "takes {}") == []


def test_quiet_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_quiet", True)
    assert work(Clock(), capsys, [(1, 10)] * 100, promise="takes {}") == []


def test_a_sequence_is_followed_too(capsys):
    clock = Clock()

    def read():
        for number in range(4):
            clock.now += 20
            yield number

    assert list(progress.track(range(3), "images", clock=clock)) == [0, 1, 2]
    assert list(progress.track(read(), "images", 4, clock)) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "images: 50 %, about 40 seconds left\n"


def test_training_says_how_far_it_is_within_an_epoch(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training, "follow", functools.partial(progress.follow, clock=clock))

    def train_epoch(x, y, advance):
        for _ in range(10):
            clock.now += 7
            advance(len(x) // 10)
        return 0.5

    epochs = training.run_epochs(train_epoch, np.zeros(100), np.zeros(100), 2, "retrain")
    assert list(epochs) == [(1, 0.5), (2, 0.5)]
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "retrain: 25 %, about 100 seconds left"


def test_on_a_terminal_a_bar_is_shown_and_the_promise_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    lines = work(
        Clock(), types.SimpleNamespace(readouterr=read_nothing), [(1, 1)] * 100, 100, "{}!"
    )
    assert lines == []
    assert "100 seconds!\n" in terminal.getvalue() and "━" in terminal.getvalue()
    assert "left" not in terminal.getvalue()


def test_where_results_are_printed_meanwhile_lines_replace_the_bar(monkeypatch):
    clock, terminal = Clock(), io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in progress.track(range(3), "batches", clock=clock, bar=False):
        clock.now += 20
    assert terminal.getvalue() == "batches: 67 %, about 20 seconds left\n"


def read_nothing():
    return types.SimpleNamespace(err="")


def test_times_are_rounded_as_a_person_says_them():
    for seconds, text in (
        (3, "10 seconds"), (44, "40 seconds"), (94, "90 seconds"), (121, "2 minutes"),
        (725, "12 minutes"), (9000, "2.5 hours"),
    ):  # fmt: skip
        assert format_duration(seconds) == text
