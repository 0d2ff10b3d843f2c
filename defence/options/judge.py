"""The command line of eval_defence.py."""

import argparse
import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from defence.base import files
from defence.base.arguments import Parser, add_general, at_least
from defence.base.errors import InputError
from defence.base.limits import Name
from defence.base.pixels import SCALES
from defence.base.progress import set_quiet
from defence.explain import plots
from defence.judge import backends, onnx_file
from defence.judge.record import VERSION
from defence.load.datasets import DATASET_SUFFIXES
from defence.load.images import IMAGE_FORMATS, MORE_FORMATS
from defence.options.common import (
    add_labels,
    add_poisoned,
    add_report,
    list_inputs,
    require_report,
)

STDIN = "-"  # as IMAGE
EXPORT, RAY, DATASET, IMAGES = "export", "ray", "dataset", "images"  # the modes of the command
NO_DATASET = (
    "--poisoned and --plot go with a clean dataset as IMAGE: an .h5 file, or, with --labelled, a "
    "folder that has a folder of images for each class"
)
OUTPUTS = ("json", "csv", "plot", "report")
USUAL = (
    *("--labelled", "--fpr", "--poisoned", "--report", "--csv", "--json", "--labels"),
    *("--fail-on-flagged", "--repaired", "--quiet"),
)
MAX_RATE = 0.5  # of --fpr; nobody wants more than half of the clean images flagged


def parse_eval(words: Sequence[str] | None = None) -> tuple[Namespace, list[Path]]:
    """Parse the command line of eval_defence.py, and check all that needs no TensorFlow.

    words: of the command line; by default the process's own.
    Return the arguments and the models: [B, G] or [a detector's .onnx file]. The arguments have
    `mode`, one of EXPORT, RAY, DATASET and IMAGES, and `images`, the files to judge; `alone` says
    whether one image was named, so that only its number is printed.
    Raise InputError where options do not go together or a file does not serve.
    """
    parser = make_parser()
    arguments = parser.parse_intermixed_args(words)
    set_quiet(arguments.quiet)
    if arguments.model is None:
        if not arguments.images:
            hint = "; a name after --poisoned counts as its file" * bool(arguments.poisoned)
            parser.error(f"MODEL is missing{hint}")
        *arguments.images, arguments.model = arguments.images
    models = backends.find_models(arguments.model, arguments.repaired)
    arguments.badnet = models[0]
    if not arguments.ray and (arguments.output or arguments.workers or arguments.ray_address):
        raise InputError("--output, --workers and --ray-address go with --ray")
    if arguments.clean:
        check_clean(arguments, models)
    if arguments.export:
        arguments.mode = EXPORT
        check_export(arguments, models)
        return arguments, models
    names = arguments.images
    if not names:
        needs_dataset = arguments.poisoned or arguments.plot
        raise InputError(NO_DATASET if needs_dataset else "give an IMAGE, or --export")
    arguments.alone = len(names) == 1 and names[0] != STDIN and not os.path.isdir(names[0])
    arguments.images = add_names_on_stdin(names, arguments.null)
    if arguments.ray:
        arguments.mode = RAY
        check_ray(arguments, models)
    else:
        check_images(arguments, models, names)
    return arguments, models


def add_names_on_stdin(names: list[str], null: bool) -> list[str]:
    """Replace STDIN among names by the names on stdin. null: whether each ends in NUL."""
    if STDIN not in names:
        if null:
            raise InputError("-0 goes with -, for the names on stdin")
        return names
    content = sys.stdin.buffer.read()
    if b"\0" in content and not null:
        raise InputError("-: the names end in NUL; add -0")
    lines = content.split(b"\0") if null else content.replace(b"\r\n", b"\n").split(b"\n")
    names = [name for name in names if name != STDIN]
    names += [os.fsdecode(line) for line in lines if line]
    if not names:
        raise InputError("-: there are no names on stdin")
    return names


def check_clean(arguments: Namespace, models: list[Path]) -> None:
    """Raise InputError where there is no BadNet to make a twin of."""
    if len(models) == 1:
        raise InputError("--clean goes with a MODEL that is a BadNet, not a detector's .onnx file")


def check_export(arguments: Namespace, models: list[Path]) -> None:
    """Raise InputError where --export comes with an option that it does not use."""
    unfit = ("images", "backend", "ray", "poisoned", *OUTPUTS, "labels", "clean")
    if len(models) == 1 or any(getattr(arguments, name) for name in unfit):
        raise InputError("--export goes with a MODEL alone, one that is not an .onnx file")
    files.check_writable({"--export": onnx_file.default_detector_path(models[1])}, models)


def check_ray(arguments: Namespace, models: list[Path]) -> None:
    """Raise InputError where --ray lacks an option or package, or comes with an unfit option."""
    if not arguments.output:
        raise InputError("--ray needs --output, the folder for the verdicts")
    unfit = ("poisoned", "json", "csv", "plot", "scale", "force", "labelled")
    options = [f"--{name}" for name in unfit if getattr(arguments, name)]
    if options or arguments.backend == "keras":
        raise InputError(f"{', '.join(options) or '--backend keras'}: does not go with --ray")
    onnx_file.require_packages("ray", "pyarrow", packages="requirements-scale.txt")
    if page := arguments.report:
        images = map(strip_scheme, arguments.images)
        files.check_writable({"--report": page}, list_read(arguments, models, images))
        require_report(page)
        folder = os.path.realpath(strip_scheme(arguments.output))
        if Path(os.path.realpath(page)).is_relative_to(folder):
            raise InputError(f"{page}: is inside --output, which holds only verdicts")


def check_images(arguments: Namespace, models: list[Path], names: list[str]) -> None:
    """Find the files to judge. Raise InputError where they or the outputs do not go together.

    names: from the command line, without the names on stdin.
    """
    if arguments.labelled:
        check_labelled(names)
    paths = list(map(Path, arguments.images))
    datasets = [p for p in paths if arguments.labelled or p.suffix.lower() in DATASET_SUFFIXES]
    arguments.images = datasets if arguments.labelled else files.list_files(arguments.images)
    arguments.mode = DATASET if datasets else IMAGES
    if datasets and len(arguments.images) > 1:
        raise InputError(f"{datasets[0]}: give only one dataset, or images")
    if (arguments.poisoned or arguments.plot) and not datasets:
        folders = len(names) == 1 and has_folders(names[0])
        hint = f"{names[0]}: counts as images without --labelled; add it. " if folders else ""
        raise InputError(hint + NO_DATASET)
    outputs = {f"--{name}": getattr(arguments, name) for name in OUTPUTS}
    read = list_read(arguments, models, [*datasets, *arguments.poisoned])
    files.check_writable(outputs, itertools.chain(arguments.images, read))
    if arguments.plot:
        plots.require_format(arguments.plot)
    if arguments.report:
        require_report(arguments.report)


def check_labelled(names: Sequence[str]) -> None:
    """Raise InputError unless --labelled comes with one folder of class folders."""
    wanted = "--labelled takes one folder that has a folder of images for each class"
    if len(names) > 1:
        raise InputError(f"{names[1]}: is one IMAGE too many; {wanted}")
    if not os.path.isdir(names[0]):
        hint = "; an .h5 dataset needs no --labelled" * (Path(names[0]).suffix in DATASET_SUFFIXES)
        raise InputError(f"{names[0]}: is not a folder; {wanted}{hint}")
    if not has_folders(names[0]):
        raise InputError(
            f"{names[0]}: has no folder of images for each class; leave --labelled out to judge "
            "its files as images"
        )


def has_folders(name: str) -> bool:
    """Return whether a path is a folder with a visible folder in it."""
    folders = next(os.walk(name), ("", [], []))[1]
    return any(folder[0] != "." for folder in folders)


def strip_scheme(name: str) -> str:
    """Return the path that a file:// URI stands for, and any other name as it is."""
    from urllib.parse import unquote  # here, for the time that it takes

    scheme, _, path = name.partition("://")
    return unquote(path) if scheme == "file" else name


def list_read(
    arguments: Namespace, models: list[Path], datasets: Iterable[str | Path]
) -> Iterator[Name]:
    """Yield the files that are read besides the images: the detector's file, and list_inputs."""
    clean = [arguments.clean] if arguments.clean else []
    yield from list_inputs(models, arguments.labels, [*datasets, *clean])
    if len(models) > 1:
        badnet, repaired = models
        yield onnx_file.default_detector_path(repaired)
        if arguments.repaired is None:
            yield badnet.with_name(repaired.name)  # find_repaired compares it


# ----------------------------------------------------------------------------------- the options


def make_parser() -> Parser:
    """Make the parser of eval_defence.py."""
    parser = Parser(
        USUAL,
        description="Judge images with a BadNet and its repaired net. Where both give the same "
        "class, print it, 1 to N; where they do not, print N+1: the image is poisoned.",
        epilog="Example: eval_defence.py img/img_9.png demo_bd_net. One image: only the number. "
        "Several: 'path<TAB>class' each; an image that cannot be read does not stop the others. "
        "A dataset: a table of figures, each with its 95 % interval. Exit status: 0 "
        "done; 1 failed; 2 wrong input, or an image could not be read; 3 an image was flagged "
        "(with --fail-on-flagged, even if another could not be read).",
        usage="%(prog)s IMAGE [IMAGE …] MODEL [options]",
    )
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE … MODEL",
        nargs="*",
        help="IMAGE: an image file; a folder, in which every file at any depth is judged; one .h5 "
        "dataset; or - for the names of images on stdin, one per line. MODEL: the BadNet, a name "
        "in models/ or a path; or a detector's .onnx file",
    )
    add(
        "--model",
        metavar="MODEL",
        help="name MODEL here, not as the last word: --model MODEL IMAGE …. Every other word is "
        "then an IMAGE, however many there are",
    )
    add("-0", "--null", action="store_true", help="the names on stdin end in NUL (find -print0)")
    add(
        "--labelled",
        action="store_true",
        help="IMAGE is a folder with a folder of images for each class; judge it as a dataset",
    )
    _add_judging(parser.add_argument_group("what is flagged"))
    _add_results(parser.add_argument_group("what is written"))
    _add_nets(parser.add_argument_group("the nets"))
    _add_ray(parser.add_argument_group("on Ray, for more images than one machine can judge"))
    add(
        "--formats",
        metavar="LIST",
        type=parse_formats,
        default=IMAGE_FORMATS,
        help="image formats to read, such as png,jpeg,webp. webp, bmp and gif (the first frame) "
        "are refused by default, because every decoder can be attacked (default: png,jpeg)",
    )
    add_general(parser, VERSION)
    return parser


def parse_formats(text: str) -> tuple[str, ...]:
    """Parse a text such as "png,jpeg" to formats as Pillow calls them."""
    available = (*IMAGE_FORMATS, *MORE_FORMATS)
    names = [name.strip().upper() for name in text.split(",")]
    formats = tuple(dict.fromkeys("JPEG" if name == "JPG" else name for name in names))
    if not {*formats} <= {*available}:
        choices = ", ".join(available).lower()
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {choices}")
    return formats


def parse_rate(text: str) -> float:
    """Parse --fpr. A rate above MAX_RATE is a percentage that somebody forgot to divide by 100."""
    percent, sign, rest = text.partition("%")
    number = at_least(0, above=True)(percent if sign and not rest.strip() else text)
    if not sign and number <= MAX_RATE:
        return number
    meant = number if (sign or number >= 1) and number <= 100 * MAX_RATE else 1
    problem = f"means {100 * number:g} % of clean images, and {100 * MAX_RATE:g} % is the most"
    raise argparse.ArgumentTypeError(
        f"'{text}' {'is a percentage' if sign else problem}; for {meant:g} % write {meant / 100:g}"
    )


def _add_judging(group: Any) -> None:
    group.add_argument(
        "--fpr",
        metavar="RATE",
        type=parse_rate,
        help="flag an image by its anomaly score, which measures how far apart the answers of B "
        "and G are, not by their disagreement. On average, at most this fraction of clean images "
        "is flagged. The threshold is a score of the images that repair.py --holdout held out; "
        "0.01 needs 99 of them",
    )
    add_poisoned(
        group,
        "poisoned datasets, whose 'label' is the attack's target, to judge beside the clean one",
    )


def _add_results(group: Any) -> None:
    add = group.add_argument
    add("--json", metavar="FILE", help="also write the results as JSON; - writes them to stdout")
    add(
        "--csv",
        metavar="FILE",
        help="also write a row for each image: its path, or its dataset and index (from 0, in the "
        "dataset's order); class, as printed; badnet_class, repaired_class, score; error, or label "
        "as in the file, which counts from 0; - writes the rows to stdout. A path that a "
        "spreadsheet would run as a formula gets ./ in front, any other such text '",
    )
    add(
        "--plot",
        metavar="FILE",
        help="draw ROC curves, the scores and flagged images, as .png, .svg or .pdf",
    )
    add_report(group, "what was flagged, the class behind it, and the trigger")
    add(
        "--clean",
        metavar="DATA",
        help="the clean dataset of the repair. Where a cut-out works as a trigger, make a twin of "
        "the BadNet from it, without its backdoor, in up to a minute: what fools the twin as well "
        "is a natural feature, not a planted trigger",
    )
    add_labels(group)
    add(
        "--export",
        action="store_true",
        help="judge nothing; write NAME_detector.onnx beside the repaired net, as repair.py does, "
        "and with --fpr the threshold in it",
    )
    add(
        "--fail-on-flagged",
        action="store_true",
        help="exit with status 3 where an image counts as poisoned",
    )


def _add_nets(group: Any) -> None:
    add = group.add_argument
    add(
        "--repaired",
        metavar="FILE",
        help="the repaired net (default: NAME_defence.h5, in models/ or beside MODEL)",
    )
    add(
        "--backend",
        choices=backends.BACKENDS,
        help="what runs the nets (default: onnx, if NAME_detector.onnx was made from them)",
    )
    add(
        "--scale",
        choices=SCALES,
        help="pixels that the nets take, if the repaired net has no repair record",
    )
    add(
        "--force",
        action="store_true",
        help="judge even if the repaired net was made from another BadNet, or is the same net",
    )


def _add_ray(group: Any) -> None:
    add = group.add_argument
    add(
        "--ray",
        action="store_true",
        help="judge images on Ray, and write the verdicts as Parquet to --output; IMAGE may be "
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
        help="the largest number of detectors at a time (default: one for each processor)",
    )
