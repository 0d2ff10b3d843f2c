"""The options of the two commands, and the settings of a repair."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

from defence import cli, harden
from defence.backends import BACKENDS
from defence.cli import InputError, at_least, setting
from defence.pixels import SCALES
from defence.record import VERSION
from utils import MORE_FORMATS, PICTURE_FORMATS

APART = ("layer", "scale")  # of the Settings, in a repair record
# The options that something comes of where nothing is repaired, besides MODEL and DATA.
GENERAL = {"model", "data", "layer", "scale", "max_bytes", "quiet"}
LOOKS = {"check": GENERAL, "scan": GENERAL | {"seed", "json", "labels"}}


@dataclasses.dataclass(frozen=True)
class Settings(harden.Settings):
    """The constants of the method. The defaults are the report's."""

    layer: str = None
    scale: str = None
    harden: bool = False
    threshold: float = setting(
        0.95, at_least(0, most=1), "prune down to this fraction of the accuracy before"
    )
    retrain_epochs: int = setting(5, at_least(0, int), "epochs for the last Dense layer")
    retrain_learning_rate: float = setting(
        1e-3, at_least(0, above=True), "Adam's learning rate for the last Dense layer"
    )
    rounds: int = setting(6, at_least(0, int), "rounds of fine-tuning, at most")
    epochs: int = setting(5, at_least(1, int), "epochs in a round")
    learning_rate: float = setting(
        1e-4, at_least(0, above=True), "Adam's learning rate for fine-tuning"
    )
    batch_size: int = setting(32, at_least(1, int), "images in a training step")
    seed: int = setting(0, at_least(0, int, most=2**32 - 1), "of the order of images, and dropout")
    holdout: float = 0.0

    def recorded(self):
        """What the repair record keeps of them; it has the layer and the scale on their own."""
        return {name: value for name, value in vars(self).items() if name not in APART}


# ------------------------------------------------------------------------------------ repair.py


def repair_parser():
    """The parser of repair.py. Besides the Settings it gives model, data, poisoned and so on."""
    parser = cli.Parser(
        description="Repair a BadNet with clean data: prune the channels that clean images use "
        "least, retrain the last Dense layer, fine-tune the layers behind the pruned one; with "
        "--harden also train the whole net on pictures that are changed at random.",
        epilog="Example: repair.py models/demo_bd_net.h5 data/demo_clean_validation_data.h5 "
        "--harden --holdout 0.1. Exit status: 0 repaired, 1 failed, 2 wrong input, 3 found "
        "a backdoor (--scan).",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the BadNet B: a Keras model, .h5 or .keras")
    add(
        "data",
        metavar="DATA",
        help="clean validation set: .h5 with 'data' and 'label', or a folder with a folder of "
        "pictures for each class, in alphabetical order or as a labels.txt in it lists them",
    )
    _add_measuring(parser.add_argument_group("does it work"))
    _add_hardening(parser.add_argument_group("hardening: a step beyond the report"))
    _add_writing(parser.add_argument_group("what is written"))
    method = parser.add_argument_group("the report's method")
    method.add_argument(
        "--layer",
        metavar="NAME",
        help="layer whose feature map is pruned (default: that of the last map on every path; "
        "help: list them)",
    )
    method.add_argument(
        "--scale",
        choices=SCALES,
        help="pixels that the BadNet takes (default: what serves it best)",
    )
    cli.add_settings(method, Settings)
    cli.add_general(parser, VERSION)
    return parser


def parse_repair():
    """Parse the command line of repair.py."""
    parser = repair_parser()
    arguments = parser.parse_intermixed_args()
    cli.be_quiet(arguments.quiet)
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    for mode, fit in LOOKS.items():
        idle = [f"--{name.replace('_', '-')}" for name in given if name not in {mode, *fit}]
        if getattr(arguments, mode) and idle:
            parser.error(f"{', '.join(idle)}: does nothing with --{mode}")
    idle = [f"--{name.replace('_', '-')}" for name in given if name.startswith("harden_")]
    if idle and not arguments.harden:
        parser.error(f"{', '.join(idle)}: does nothing without --harden")
    return arguments


def _add_measuring(group):
    look = group.add_mutually_exclusive_group()
    look.add_argument(
        "--check",
        action="store_true",
        help="repair nothing, only look whether DATA can serve: the BadNet's accuracy, images of "
        "each class, pixels; warnings make the exit status 1",
    )
    look.add_argument(
        "--scan",
        action="store_true",
        help="repair nothing, only say whether the net looks backdoored, and to which class, as "
        "--harden also says; a class that stands out makes the exit status 3",
    )
    group.add_argument(
        "--holdout",
        metavar="FRACTION",
        type=at_least(0, most=0.9),
        default=Settings.holdout,
        help="keep this fraction of DATA out of the repair and measure clean accuracy and "
        "false-positive rate on it; eval_defence.py --fpr needs it (default: 0)",
    )
    _add_poisoned(
        group,
        "poisoned datasets, 'label' being the attack's target: report the attack success rate "
        "after each step; nothing is trained or decided on them",
    )


def _add_poisoned(group, what):
    group.add_argument(
        "--poisoned", metavar="FILE", nargs="+", action="extend", default=[], help=what
    )


def _add_hardening(group):
    group.add_argument(
        "--harden",
        action="store_true",
        help="against backdoors in channels that clean images use: teach G the labels of pictures "
        "that are changed at random, so that no such change can tell it what to answer",
    )
    cli.add_settings(group, harden.Settings)


def _add_writing(group):
    add = group.add_argument
    add("--output", metavar="FILE", help="G's file (default: models/NAME_defence.h5)")
    add("--json", metavar="FILE", help="also write the repair record as JSON; - for stdout")
    add("--plot", metavar="FILE", help="draw the pruning curve, as .png, .svg or .pdf")
    _add_report(group, "how the repair went, and whether the net looks backdoored")
    _add_labels(group)
    add(
        "--no-export",
        action="store_true",
        help="do not write NAME_detector.onnx beside G, both nets and the verdict in one file, by "
        "which eval_defence.py judges without the seconds that TensorFlow takes to start",
    )


# ------------------------------------------------------------------------------ eval_defence.py


def eval_parser():
    """The parser of eval_defence.py."""
    parser = cli.Parser(
        description="Judge images with a BadNet and its repaired net. Where both give the same "
        "class, print it, 1 to N; where they do not, print N+1: the image is poisoned.",
        epilog="Example: eval_defence.py img/img_9.png demo_bd_net. One picture: the number alone. "
        "Several: 'path<TAB>class' each; one that cannot be read does not keep the others from "
        "being judged. A dataset: a table of figures, each with its 95 % interval. Exit status: "
        "0 done, 1 failed, 2 wrong input, 3 flagged (--fail-on-flagged).",
        usage="%(prog)s IMAGE [IMAGE …] MODEL [options]",
    )
    parser.add_argument(
        "images",
        metavar="IMAGE … MODEL",
        nargs="*",
        help="IMAGE: a picture, a folder, of which every file at any depth is judged, one .h5 "
        "dataset, or - for the names of pictures on stdin, one a line. MODEL: the BadNet, a name "
        "in models/ or a path; or a detector's .onnx file",
    )
    parser.add_argument("--model", metavar="MODEL", help="the same; then all others are IMAGE")
    parser.add_argument(
        "-0",
        "--null",
        action="store_true",
        help="the names on stdin end in NUL, as of find -print0",
    )
    parser.add_argument(
        "--labelled",
        action="store_true",
        help="IMAGE is a folder with a folder of pictures for each class; judge it as a dataset",
    )
    _add_judging(parser.add_argument_group("what is flagged"))
    _add_results(parser.add_argument_group("what is written"))
    _add_nets(parser.add_argument_group("the nets"))
    _add_ray(parser.add_argument_group("on Ray, for more pictures than one machine can judge"))
    parser.add_argument(
        "--formats",
        metavar="LIST",
        type=picture_formats,
        default=PICTURE_FORMATS,
        help="of pictures to read, such as png,jpeg,webp; webp, bmp and gif (the first frame) are "
        "refused by default, because each decoder is one more to attack (default: png,jpeg)",
    )
    cli.add_general(parser, VERSION)
    return parser


def parse_eval(words=None):
    """Parse the command line of eval_defence.py: unless --model is given, what comes last is it.

    words: [str, …], if not those that the process was started with.
    """
    parser = eval_parser()
    arguments = parser.parse_intermixed_args(words)
    cli.be_quiet(arguments.quiet)
    if arguments.model is None:
        if not arguments.images:
            swallowed = "; a name behind --poisoned counts as its file" * bool(arguments.poisoned)
            parser.error(f"MODEL is missing{swallowed}")
        *arguments.images, arguments.model = arguments.images
    return arguments


def picture_formats(text):
    """The formats in a text such as "png,jpeg", as Pillow calls them: (str, …)."""
    known = (*PICTURE_FORMATS, *MORE_FORMATS)
    given = [each.strip().upper() for each in text.split(",")]
    formats = tuple(dict.fromkeys("JPEG" if each == "JPG" else each for each in given))
    if not {*formats} <= {*known}:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {', '.join(known).lower()}")
    return formats


def _add_judging(group):
    group.add_argument(
        "--fpr",
        metavar="RATE",
        type=at_least(0, most=1, above=True),
        help="instead of where B and G disagree, flag an image whose anomaly score, how far apart "
        "their answers are, is above the threshold that flagged this fraction of the clean images "
        "that repair.py --holdout kept out of the repair, such as 0.01",
    )
    _add_poisoned(
        group, "poisoned datasets, 'label' being the attack's target, to judge beside the clean one"
    )


def _add_labels(group):
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="names of the classes, one a line, to be shown beside their numbers (default: "
        "labels.txt beside MODEL, if it is there)",
    )


def _add_report(group, what):
    group.add_argument(
        "--report", metavar="FILE", help=f"write a page, .html, that shows {what}; it stands alone"
    )


def require_report(path):
    """Raise InputError where no page of --report can be made: before the work, not after."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a page's name ends in .html")
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--report needs {package}: pip install {package}")


def _add_results(group):
    add = group.add_argument
    add("--json", metavar="FILE", help="also write what is printed as JSON; - writes it to stdout")
    add(
        "--csv",
        metavar="FILE",
        help="also write a row for each image: its path, or dataset and index (from 0, in the "
        "dataset's order); class, as printed, badnet_class, repaired_class, score; error, or label "
        "as in the file, which counts from 0; - writes it to stdout",
    )
    add(
        "--plot",
        metavar="FILE",
        help="draw ROC curves, the scores and flagged images, as .png, .svg or .pdf",
    )
    _add_report(group, "what was flagged, the class behind it, and the trigger")
    _add_labels(group)
    add(
        "--export",
        action="store_true",
        help="judge nothing, but write NAME_detector.onnx beside the repaired net, as repair.py "
        "does, with --fpr the threshold in it",
    )
    add(
        "--fail-on-flagged",
        action="store_true",
        help="exit status 3 where an image counts as poisoned",
    )


def _add_nets(group):
    add = group.add_argument
    add(
        "--repaired",
        metavar="FILE",
        help="the repaired net (default: NAME_defence.h5, in models/ or beside MODEL)",
    )
    add(
        "--backend",
        choices=BACKENDS,
        help="what runs the nets (default: onnx, where NAME_detector.onnx was made of them)",
    )
    add(
        "--scale",
        choices=SCALES,
        help="pixels that the nets take, for a repaired net without a repair record",
    )
    add(
        "--force",
        action="store_true",
        help="judge even if the repaired net was made from another BadNet",
    )


def _add_ray(group):
    add = group.add_argument
    add(
        "--ray",
        action="store_true",
        help="judge pictures on Ray, and write the verdicts as Parquet to --output; IMAGE may be "
        "a URI (s3, gs, hdfs). The same command resumes a run that was cut off",
    )
    add("--output", metavar="FOLDER", help="where the verdicts go, a folder or a URI")
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="of a cluster, such as 10.0.0.1:6379 (default: start Ray on this machine)",
    )
    add(
        "--workers",
        metavar="N",
        type=at_least(1, int),
        help="detectors at a time, at most (default: as many as processors)",
    )
