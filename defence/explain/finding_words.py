"""A Finding in words: what stands out, what it means and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from defence.base.text import escape, format_count, format_percent, number_class
from defence.beyond.finding import SHOWN, Finding

# What was disturbed in each way, in words.
DISTURBED = {
    "disturbed": "disturbed images and feature maps",
    "maps": "raised feature maps",
    "quiet": "quiet channels that are raised strongly",
}
LOOK = (
    "next: look at the images of such a class, since a class that looks unlike all others may "
    "stand out, too"
)
ADVICE = f"{LOOK}; then repair the BadNet with --harden"


def describe_finding(
    finding: Finding, class_names: Sequence[str] | None = None, hardened: bool = False
) -> Iterator[str]:
    """Yield a Finding as lines of text: what stands out, what it means and what to do next.

    hardened: whether the BadNet has been repaired with --harden meanwhile.
    """
    if finding.finding == "none" or finding.p_value is None:
        yield f"no finding about a backdoor: {finding.reason}"
        return
    if finding.finding == "nothing":
        clearest = name_clearest(finding, class_names)
        chance = describe_p_value(finding.p_value, finding)
        yield (
            f"no sign of a backdoor of the kinds that a scan shows in {finding.wrong} wrong "
            f"answers to disturbed images (the clearest: {clearest}, {chance}); this "
            "does not prove that there is none"
        )
        return
    for row in list_target_rows(finding)[:SHOWN]:
        yield describe_target(row, finding, class_names)
    if finding.shift:
        yield describe_shift(finding)
    yield LOOK if hardened else ADVICE


def name_clearest(finding: Finding, class_names: Sequence[str] | None) -> str:
    """Return what stands out most where nothing stands out enough: a class, or a shift."""
    row = finding.classes[0]
    if finding.shift_p_value is not None and finding.shift_p_value < row["p_value"]:
        return "a shift of all classes"
    return describe_class(row["class"], class_names)


def describe_class(number: int, class_names: Sequence[str] | None) -> str:
    """Return a class with its name, if it has one. number: from 1."""
    name = escape(class_names[number - 1]) if class_names else None
    return f"class {number_class(number, name)}"


def list_target_rows(finding: Finding) -> list[dict[str, Any]]:
    """Return the rows of a Finding's `classes` that are targets, the clearest first."""
    return [row for row in finding.classes if row["class"] in finding.targets]


def describe_target(
    row: dict[str, Any], finding: Finding, class_names: Sequence[str] | None = None
) -> str:
    """Return a line of text about a target. row: of the Finding's `classes`."""
    name = describe_class(row["class"], class_names)
    chance = describe_p_value(row["p_value"], finding)
    if row["way"] == "sought":
        sign = (
            f"a patch of {row['value']:.0f} pixels turns images into {name}, "
            f"where other classes take about {row['usual']:.0f} pixels"
        )
    else:
        sign = (
            f"{name} gets {format_percent(row['value'])} of the wrong answers "
            f"to {DISTURBED[row['way']]}, most classes about {format_percent(row['usual'])}"
        )
    return f"{sign} ({chance}): the target of a backdoor looks like this"


def describe_shift(finding: Finding) -> str:
    """Return a line of text about an all-to-all attack."""
    assert finding.shift_p_value is not None  # wherever there is a shift
    return (
        f"wrong answers are often the right class + {finding.shift} "
        f"({describe_p_value(finding.shift_p_value, finding)}): a backdoor that turns every class "
        "into another (all-to-all) looks like this"
    )


def describe_p_value(p_value: float, finding: Finding) -> str:
    """Say a p-value, and how many nets without a backdoor stand out as much."""
    count = round(p_value * (finding.clean_nets + 1)) - 1
    verb = "stands" if count == 1 else "stand"
    return (
        f"p = {p_value:.2g}: {count or 'none'} of {format_count(finding.clean_nets, 'clean net')} "
        f"{verb if count else 'stands'} out as much"
    )
