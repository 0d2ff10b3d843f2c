"""The finding about a BadNet as SARIF 2.1.0, which pipelines and code hosts read (OASIS, 2020).

The log holds nothing that varies from run to run, so that the same scan gives the same file.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defence.base import files
from defence.explain import finding_words
from defence.judge.record import VERSION

if TYPE_CHECKING:
    from defence.base.limits import Name
    from defence.beyond.finding import Finding
    from defence.load.models import ModelFile

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
TOOL = "badnet-defence"
BASE = "%SRCROOT%"  # where relative paths begin, as code hosts call it
TARGET, SHIFT, CANNOT_TELL = "backdoor-target", "backdoor-shift", "scan-cannot-tell"
REPAIR = (
    "Do not use the net as it is. Repair it with `repair.py MODEL DATA --harden --holdout 0.1 "
    "--report PAGE.html`: the page shows this finding and what the repair did. Then judge images "
    "with `eval_defence.py IMAGE … MODEL --report PAGE.html`: that page shows the flagged images "
    "and the trigger."
)
# {rule: (level, short description, full description, help)}. A rule's name never changes, since
# code hosts know an old result by it.
RULES = {
    TARGET: (
        "error",
        "A class stands out as the target of a backdoor.",
        "The net gives disturbed images this class instead of the right one far more often than "
        "other classes, or a far smaller patch turns images into it, and this stands out more than "
        "in nearly all nets without a backdoor. So an image that carries the attacker's trigger "
        "may get this class. A class whose images look unlike all others may stand out too.",
        "Look at the images of this class first: where they look unlike all others, for example "
        f"all tinted, they may explain the finding. {REPAIR}",
    ),
    SHIFT: (
        "error",
        "Wrong answers follow the right class, as after an all-to-all attack.",
        "The net gives disturbed images the class a fixed number of classes beyond the right one, "
        "more often than nearly all nets without a backdoor do. So the attacker's trigger may turn "
        "every class into another.",
        f"No single class is the target, so look at images of several classes. {REPAIR}",
    ),
    CANNOT_TELL: (
        "note",
        "The scan cannot tell whether the net has a backdoor.",
        "The net or the dataset does not allow the scan to judge; the message gives the reason. "
        "This is neither a sign of a backdoor nor a sign that there is none.",
        "`repair.py MODEL DATA --check` says whether the dataset can serve: how often the net is "
        "right, and how many images each class has. Scan again with clean images that the net "
        "classifies correctly. A net that cannot be scanned can still be repaired with --harden.",
    ),
}


def write_log(
    path: Name, finding: Finding, class_names: Sequence[str] | None, badnet: ModelFile
) -> None:
    """Write a finding as a SARIF log. path: as for files.open_output."""
    files.write_json(make_log(finding, class_names, badnet), path)


def make_log(
    finding: Finding, class_names: Sequence[str] | None, badnet: ModelFile
) -> dict[str, Any]:
    """Return a finding about a BadNet as a SARIF log of one run, for JSON."""
    uri = make_uri(badnet.path)
    location: dict[str, Any] = {"uri": uri}
    if not badnet.path.is_absolute():
        location["uriBaseId"] = BASE
    artifact = {
        "location": location,
        "length": len(badnet.contents),
        "roles": ["analysisTarget"],
        "hashes": {"sha-256": badnet.sha256},
    }
    results = [
        make_result(rule, line, values, subject, badnet, location)
        for rule, line, values, subject in list_signs(finding, class_names)
    ]
    run = {
        "tool": {"driver": {"name": TOOL, "version": VERSION, "rules": list_rules()}},
        # Without it a code host takes the log of another net for a newer one of this net.
        "automationDetails": {"id": f"{uri}/"},
        "invocations": [{"executionSuccessful": True}],
        "artifacts": [artifact],
        "results": results,
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def make_uri(path: Path) -> str:
    """Return a path as a URI, percent-encoded; a relative path stays relative."""
    if path.is_absolute():
        return path.as_uri()
    return urllib.parse.quote_from_bytes(os.fsencode(path.as_posix()))


def list_rules() -> list[dict[str, Any]]:
    """Return the RULES as SARIF's reportingDescriptors."""
    return [
        {
            "id": rule,
            "shortDescription": {"text": short},
            "fullDescription": {"text": full},
            "help": {"text": advice},
            "defaultConfiguration": {"level": level},
            "properties": {"tags": ["security"]},
        }
        for rule, (level, short, full, advice) in RULES.items()
    ]


def list_signs(
    finding: Finding, class_names: Sequence[str] | None
) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yield (rule, line of text, values, subject) of each result that a finding gives.

    subject: what tells the result from others about the same net.
    """
    if finding.finding == "none":
        (line,) = finding_words.describe_finding(finding)
        yield CANNOT_TELL, line, {"reason": finding.reason}, "none"
        return
    common = {"wrong": finding.wrong, "clean_nets": finding.clean_nets}
    for row in finding_words.list_target_rows(finding):
        line = finding_words.describe_target(row, finding, class_names)
        name = {"class_name": class_names[row["class"] - 1]} if class_names else {}
        yield TARGET, line, row | name | common, f"class {row['class']}"
    if finding.shift:
        values = {"shift": finding.shift, "p_value": finding.shift_p_value}
        line = finding_words.describe_shift(finding)
        yield SHIFT, line, values | common, f"shift {finding.shift}"


def make_result(
    rule: str,
    line: str,
    values: dict[str, Any],
    subject: str,
    badnet: ModelFile,
    location: dict[str, Any],
) -> dict[str, Any]:
    """Return a SARIF result. rule, line, values, subject: as list_signs yields them."""
    fingerprint = f"{badnet.sha256}/{subject}"
    return {
        "ruleId": rule,
        "level": RULES[rule][0],
        "message": {"text": make_plain(line)},
        # No region: the result is about the whole file, which has no lines.
        "locations": [{"physicalLocation": {"artifactLocation": location | {"index": 0}}}],
        "partialFingerprints": {
            "modelAndClass/v1": fingerprint,
            # The only one that GitHub compares; it keeps two targets of a net apart.
            "primaryLocationLineHash": fingerprint,
        },
        "properties": values,
    }


def make_plain(line: str) -> str:
    """Return a line as SARIF's plain text: a class's name makes no placeholder and no link.

    Source: SARIF 2.1.0, sections 3.11.5 and 3.11.6.
    """
    return line.replace("{", "{{").replace("}", "}}").replace("](", "] (")
