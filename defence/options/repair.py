"""The command line of repair.py."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from defence.base import files
from defence.base.arguments import Parser, add_general, add_settings, at_least
from defence.base.errors import InputError
from defence.base.pixels import SCALES
from defence.base.progress import say, set_quiet
from defence.beyond import harden
from defence.beyond.settings import Settings
from defence.explain import plots
from defence.judge import onnx_file, record
from defence.load.models import ModelFile, default_repaired_path, read_model
from defence.options.common import (
    add_labels,
    add_poisoned,
    add_report,
    list_inputs,
    require_report,
)

# The options that have an effect where nothing is repaired, besides MODEL and DATA.
GENERAL = {"model", "data", "layer", "scale", "max_bytes", "quiet"}
USUAL = (
    *("--check", "--scan", "--harden", "--holdout", "--poisoned", "--output", "--report"),
    *("--labels", "--scale", "--quiet"),
)
MODES = {"check": GENERAL | {"labels"}, "scan": GENERAL | {"seed", "json", "sarif", "labels"}}


def parse_repair() -> tuple[Namespace, ModelFile]:
    """Parse the command line of repair.py, and check all that needs no TensorFlow.

    Return the arguments and B. The arguments' `output` is G's path, their `detector` the path of
    the detector's file or None.
    Raise InputError where B is not a net to repair or an output cannot be written.
    """
    parser = make_parser()
    arguments = parser.parse_intermixed_args()
    set_quiet(arguments.quiet)
    refuse_idle_options(parser, arguments)
    badnet = read_model(arguments.model, arguments.max_bytes)
    repairs = not (arguments.check or arguments.scan or arguments.layer == "help")
    arguments.output = Path(arguments.output or default_repaired_path(badnet.path))
    if arguments.output.suffix != ".h5":
        raise InputError(f"{arguments.output}: the repaired net is saved as a .h5 file")
    exports = repairs and not arguments.no_export
    arguments.detector = onnx_file.default_detector_path(arguments.output) if exports else None
    check_outputs(arguments, badnet, repairs)
    _ = badnet.declared
    record.refuse_repaired(badnet)
    return arguments, badnet


def announce_replacement(arguments: Namespace) -> None:
    """Say which repaired net the command will replace, if there is one."""
    if arguments.output.exists():
        old = record.describe_repaired(arguments.output, arguments.max_bytes)
        say(f"{arguments.output} will be replaced: {old}")


def refuse_idle_options(parser: Parser, arguments: Namespace) -> None:
    """End the command with an error where an option has no effect."""
    options = vars(arguments).items()
    changes = [name for name, value in options if value != parser.get_default(name)]
    for mode, useful in MODES.items():
        idle = [f"--{name.replace('_', '-')}" for name in changes if name not in {mode, *useful}]
        if getattr(arguments, mode) and idle:
            parser.error(f"{', '.join(idle)}: does nothing with --{mode}")
    idle = [f"--{name.replace('_', '-')}" for name in changes if name.startswith("harden_")]
    if idle and not arguments.harden:
        parser.error(f"{', '.join(idle)}: does nothing without --harden")
    if arguments.sarif and not (arguments.scan or arguments.harden):
        parser.error("--sarif: does nothing without --scan or --harden")


def check_outputs(arguments: Namespace, badnet: ModelFile, repairs: bool) -> None:
    """Raise InputError unless every output file can be written."""
    datasets = [arguments.data, *arguments.poisoned]
    inputs = list_inputs([badnet.path], arguments.labels, datasets)
    if not repairs:
        logs = {"--json": arguments.json, "--sarif": arguments.sarif}
        files.check_writable(logs, inputs)
        return
    names = ("output", "json", "sarif", "plot", "report")
    outputs = {f"--{name}": getattr(arguments, name) for name in names}
    files.check_writable(outputs | {"the detector's file": arguments.detector}, inputs)
    if arguments.plot:
        plots.require_format(arguments.plot)
    if arguments.report:
        require_report(arguments.report)


# ----------------------------------------------------------------------------------- the options


def make_parser() -> Parser:
    """Make the parser of repair.py. Its options include every setting of a repair."""
    parser = Parser(
        USUAL,
        description="Repair a BadNet with clean data: prune the channels that clean images use "
        "least, retrain the last Dense layer, fine-tune the layers behind the pruned one. "
        "--harden then trains the whole net on images that are changed at random.",
        epilog="Example: repair.py models/demo_bd_net.h5 data/demo_clean_validation_data.h5 "
        "--harden --holdout 0.1. Exit status: 0 done; 1 failed, or --check warned; 2 wrong "
        "input; 3 --scan found a backdoor; 4 --scan cannot tell.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the BadNet B: a Keras model, .h5 or .keras")
    add(
        "data",
        metavar="DATA",
        help="clean validation set: an .h5 file with 'data' and 'label', or a folder that has a "
        "folder of images for each class, in alphabetical order or as its labels.txt lists them",
    )
    _add_measuring(parser.add_argument_group("does it work"))
    _add_hardening(parser.add_argument_group("hardening: a step beyond the report"))
    _add_writing(parser.add_argument_group("what is written"))
    method = parser.add_argument_group("the report's method")
    method.add_argument(
        "--layer",
        metavar="NAME",
        help="prune this layer's feature map (default: the last map on every path; "
        "help: list all maps)",
    )
    method.add_argument(
        "--scale",
        choices=SCALES,
        help="pixels that the BadNet takes (default: the ones it is most accurate with)",
    )
    add_settings(method, Settings)
    add_general(parser, record.VERSION)
    return parser


def _add_measuring(group: Any) -> None:
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--check",
        action="store_true",
        help="repair nothing; only check whether DATA can serve: the BadNet's accuracy, the images "
        "of each class, the pixels. A warning makes the exit status 1",
    )
    mode.add_argument(
        "--scan",
        action="store_true",
        help="repair nothing; only say whether the net looks backdoored, and to which class, as "
        "--harden does too. A class that stands out makes the exit status 3, and a net that the "
        "scan cannot judge 4",
    )
    group.add_argument(
        "--holdout",
        metavar="FRACTION",
        type=at_least(0, most=0.9),
        default=Settings.holdout,
        help="keep this fraction of DATA out of the repair and measure clean accuracy on it, and "
        "how often B and G disagree; eval_defence.py --fpr needs it (default: 0)",
    )
    add_poisoned(
        group,
        "poisoned datasets, whose 'label' is the attack's target: report the attack success rate "
        "after each step. They change nothing in the repair",
    )


def _add_hardening(group: Any) -> None:
    group.add_argument(
        "--harden",
        action="store_true",
        help="also remove backdoors in channels that clean images use: train G on images that are "
        "changed at random, so that it ignores such changes",
    )
    add_settings(group, harden.Settings)


def _add_writing(group: Any) -> None:
    add = group.add_argument
    add("--output", metavar="FILE", help="G's file (default: models/NAME_defence.h5)")
    add("--json", metavar="FILE", help="also write the repair record as JSON; - for stdout")
    add(
        "--sarif",
        metavar="FILE",
        help="with --scan or --harden, write whether the net looks backdoored as a SARIF 2.1.0 "
        "log, which pipelines and code hosts read; - for stdout",
    )
    add("--plot", metavar="FILE", help="draw the pruning curve, as .png, .svg or .pdf")
    add_report(group, "how the repair went, and whether the net looks backdoored")
    add_labels(group)
    add(
        "--no-export",
        action="store_true",
        help="do not write NAME_detector.onnx beside G. That file holds both nets and the "
        "verdict; with it eval_defence.py does not wait seconds for TensorFlow to start",
    )
