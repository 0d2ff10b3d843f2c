"""Options of a command line: one-line errors, bounded numbers, options made of settings."""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from defence.base.limits import DEFAULT_MAX_BYTES
from defence.base.process import MESSAGE_LENGTH
from defence.base.text import escape


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line.

    usual: the only options that --help shows; --help-all shows all. Empty: --help shows all.
    """

    def __init__(self, usual: Iterable[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.usual, self.all = {*usual, "--help", "--help-all"}, not usual
        if not self.all:
            self.add_argument("--help-all", action=_HelpAll, help="show all options and exit")
        self.prog = escape(self.prog)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1..1 is a value, not an option

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        self._has_negative_number_optionals.clear()  # -0 is an option, and -1 is still a value
        return super().parse_known_args(*arguments, **options)

    def format_help(self) -> str:
        more = "README.md lists the documents.\n"
        if self.all:
            line = f"\n--help shows only the options that most people need; {more}"
            return super().format_help() + line * ("--help-all" in self._option_string_actions)
        hidden = {
            action: action.help
            for action in self._actions
            if action.option_strings and not self.usual & {*action.option_strings}
        }
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return f"{super().format_help()}\n--help-all shows {len(hidden)} more options; {more}"
        finally:
            for action, description in hidden.items():
                action.help = description

    def error(self, message: str) -> NoReturn:
        problem = escape(message)[:MESSAGE_LENGTH] + self._suggest(message)
        self.exit(2, f"{self.prog}: error: {problem} (see {self.prog} --help)\n")

    def _suggest(self, message: str) -> str:
        """Return what to write in the place of an option that does not exist, or nothing."""
        unrecognized = message.partition("unrecognized arguments:")[2].split()
        for word in unrecognized:
            if word.startswith("-"):
                name = word.partition("=")[0]
                similar = difflib.get_close_matches(name, self._option_string_actions, 1)
                return (
                    f"; did you mean {similar[0]}?" if similar else "; a file of that name is ./-…"
                )
        return ""


class _HelpAll(argparse.Action):
    """Show the help with all options."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        nothing = argparse.SUPPRESS  # as for --help: the parsed arguments do not have it
        super().__init__(option_strings, nothing, nargs=0, default=nothing, **options)

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        parser.all = True
        parser.print_help()
        sys.exit()


def at_least(
    smallest: float, kind: Callable = float, above: bool = False, most: float = math.inf
) -> Callable:
    """Return a type for argparse: a finite `kind` from `smallest` (or above it) to `most`."""
    expected = "a whole number" if kind is int else "a number"
    expected += f" above {smallest}" if above else f" of at least {smallest}"
    expected += f" and at most {most}" if most < math.inf else ""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (smallest <= value <= most and value < math.inf) or (above and value == smallest):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


def setting(default: Any, kind: Callable, description: str) -> Any:
    """Return a field of a dataclass of settings, from which `add_settings` makes an option.

    kind: the option's type, for argparse.  description: its help.
    """
    metadata = {"kind": kind, "description": description}
    return dataclasses.field(default=default, metadata=metadata)


def add_settings(group: Any, settings: Any) -> None:
    """Add an option to a group of a parser for each `setting` that a dataclass itself declares."""
    for field in dataclasses.fields(settings):
        if field.name in settings.__annotations__ and "kind" in field.metadata:
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                metavar="N",
                type=field.metadata["kind"],
                default=field.default,
                help=f"{field.metadata['description']} (default: {field.default})",
            )


def take_settings(settings: Any, arguments: argparse.Namespace) -> Any:
    """Return the dataclass `settings`, filled from the parsed options of the same names."""
    names = [field.name for field in dataclasses.fields(settings)]
    return settings(**{name: getattr(arguments, name) for name in names})


def add_general(parser: argparse.ArgumentParser, version: str) -> None:
    """Add --quiet, --version, and --max-memory in GB, whose value `max_bytes` is in bytes."""
    group = parser.add_argument_group("general")
    group.add_argument(
        "--quiet", action="store_true", help="no remarks and no progress on stderr, only warnings"
    )
    group.add_argument("--version", action="version", version=f"%(prog)s {version}")
    in_gb = at_least(0, above=True, most=10**6)
    group.add_argument(
        "--max-memory",
        dest="max_bytes",
        metavar="GB",
        type=lambda text: int(in_gb(text) * 2**30),
        default=DEFAULT_MAX_BYTES,
        help="refuse a file that needs more memory than this for any one thing, such as a net's "
        "weights, a layer's output or an image; larger features go to disk (default: 1)",
    )
