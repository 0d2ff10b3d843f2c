"""What a repair achieved, in words, and what to do next: for the terminal and for the page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base.text import escape, format_count, format_percent
from defence.beyond import harden
from defence.judge import figures

if TYPE_CHECKING:
    from defence.judge.record import RepairRecord

# G carries the backdoor where the interval of its attack success rate lies above this. A net of few
# classes that has no backdoor gives some poisoned images the target by chance.
CARRIES = 0.1
# Of tests/results/results.csv: triggers, and those with report_attack_success_rate_repaired > 0.5.
TRIGGERS, LEFT_IN = 59, 44
LEFT_MOST = (
    f"{LEFT_IN} of {TRIGGERS} triggers in our tests still worked on more than half of the images"
)
HOLD_OUT = ("--holdout", "0.1")  # as README and docs recommend it


def measure_attacks(record: RepairRecord) -> dict[str, dict[str, Any]]:
    """Return the attack success rate on G of each poisoned dataset, {name: figure}.

    The figures are as figures.estimate_proportion returns them, after the repair's last step.
    """
    rates = record.attack_success_rate["hardened" if record.is_hardened() else "fine_tuned"]
    sizes = [data["images"] for data in record.poisoned or ()]
    return {
        name: figures.estimate_proportion(np.arange(size) < round(rate * size))
        for (name, rate), size in zip(rates.items(), sizes)
    }


def find_left(record: RepairRecord) -> list[str]:
    """Return the names of the poisoned datasets whose backdoor G still carries: a failed repair."""
    attacks = measure_attacks(record)
    return [name for name, rate in attacks.items() if rate["of"] and rate["low"] > CARRIES]


def describe_outcome(record: RepairRecord) -> list[str]:
    """Say whether G still carries the backdoor, as far as is known, as lines of text.

    The backdoors that are left come first, then the images that B was fooled by.
    """
    left, before = find_left(record), record.attack_success_rate["before"]
    attacks = [(name, rate) for name, rate in measure_attacks(record).items() if rate["of"]]
    attacks.sort(key=lambda attack: (attack[0] not in left, before[attack[0]] <= CARRIES))
    lines = [describe_attack(name, rate, before[name], name in left) for name, rate in attacks]
    return lines if left else [*lines, describe_limits(record)]


def describe_attack(name: str, rate: dict[str, Any], before: float, is_left: bool) -> str:
    """Say how far a poisoned dataset still fools G.

    rate: the attack success rate on G, a figure.  before: on B, 0..1.
    """
    cell = (
        f"{format_percent(rate['value'])} of {escape(name)} with the target (95 % interval "
        f"{format_percent(rate['low'])} .. {format_percent(rate['high'])})"
    )
    if is_left:
        return f"The repair failed: G still carries the backdoor. It answers {cell}."
    if before <= CARRIES:
        return (
            f"B answers only {format_percent(before)} of {escape(name)} with the target, so these "
            "images do not show whether the repair worked."
        )
    return f"G answers {cell}, B {format_percent(before)}."


def describe_loss(record: RepairRecord) -> list[str]:
    """Say that a hardened G errs more than B, where the intervals of held-out images are apart.

    Return lines of text, none elsewhere.
    """
    held_out = record.holdout or {}
    before, after = (held_out.get(f"clean_accuracy_{net}") for net in ("badnet", "repaired"))
    if not (record.is_hardened() and before and after and after["high"] < before["low"]):
        return []
    points = f"{100 * (before['value'] - after['value']):.1f}"
    return [
        f"G's clean accuracy on held-out images is {points} points below B's. Do not serve G "
        "alone: with --fpr, B's class is the answer, and G only flags. More clean images may help."
    ]


def describe_limits(record: RepairRecord) -> str:
    """Say what a repair that has not failed does not prove."""
    reason = f"after these steps alone, {LEFT_MOST}"
    if record.is_hardened():
        reason = "a trigger unlike every image change in the training may survive"
    claim = "no other trigger works" if record.poisoned else "the backdoor is gone"
    return f"This does not prove that {claim}: {reason}."


def describe_next(record: RepairRecord, words: Sequence[str], judge: Sequence[str]) -> str:
    """Say what to do next, in one line; a command in it can be run as it stands.

    words: of the command that made the repair, from the script on.
    judge: what names B and G to eval_defence.py.
    """
    failed = bool(find_left(record))
    if not record.is_hardened():
        command = join_command(words, "--harden", *([] if record.holdout else HOLD_OUT))
        return f"{'Harden it' if failed else 'To remove more backdoors, harden it'}: {command}"
    if failed:
        return " ".join(advise_after_failure(record))
    if record.holdout is None:
        return f"To set a threshold, hold out images: {join_command(words, *HOLD_OUT)}"
    rate = record.holdout["expected_false_positive_rate"]["fpr"]
    return "Judge images: " + join_command(
        ["eval_defence.py", "IMAGES", *judge], "--fpr", f"{rate:g}"
    )


def advise_after_failure(record: RepairRecord) -> Iterator[str]:
    """Yield sentences on what is left to do where hardening did not remove the backdoor."""
    yield "Use neither B nor G on images that others can choose."
    steps, usual = record.settings["harden_steps"], harden.Settings.harden_steps
    if steps < usual:
        yield f"Harden it longer: leave --harden-steps out, which takes {usual} steps, not {steps}."
    else:  # docs/hardening.md, "Where it fails"
        yield (
            "In our tests, more clean images helped; this repair had "
            f"{format_count(record.data['images'], 'image')}."
        )


def join_command(words: Sequence[str], *options: str) -> str:
    """Join words to a command that a shell runs, with options added."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    return shlex.join(["python", *words[:end], *options, *words[end:]])
