"""The repair record: how G was made from B and what the repair did, as G's file carries it.

Only this module makes, checks, writes and reads it. The record holds nothing that varies from run
to run, so that the same repair gives the same file, byte for byte.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from defence.base import pixels
from defence.base.errors import InputError
from defence.judge import detector, figures
from defence.load import guard
from defence.load.class_names import is_name
from defence.load.guard_hdf5 import read_text
from defence.load.models import ModelFile, read_model

if TYPE_CHECKING:
    from defence.net.cached_net import CachedNet

VERSION = "0.2.0"
ATTRIBUTE = "repair_record"  # of the root of G's file
LIBRARIES = ("tensorflow", "keras", "numpy", "h5py")
DIGITS = 8  # of the SHA-256 of a dataset that shares its name
NAMES_LENGTH = guard.TEXT_LENGTH // 2  # of all classes' names, as JSON
STEPS = ("before", "pruned", "retrained", "fine_tuned", "hardened")


@dataclasses.dataclass
class RepairRecord:
    """What a repair was made from and what it did; channels count from 0, classes from 1.

    libraries: {name: version}.
    badnet: {"file", "sha256"}.  data: {"file", "sha256", "images"}.  settings: {name: value}.
    input_scale: a key of pixels.SCALES.  layer: its feature map was pruned.  channels: of the map.
    order: its channels by ascending mean activation.  mean_activation: of each channel.
    pruned: channels in the order they were pruned.
    accuracy: {step: 0..1, "after_each_channel": [0..1, …], "after_each_round": [0..1, …]} on data;
    steps are before, pruned, retrained, fine_tuned, hardened.
    attack_success_rate: the same steps and "after_each_channel", each {name: as above}, where the
    names are of name_datasets(poisoned).
    moved: {"answers", "weights"}: how far G is from B.
    holdout: figures of images kept out of the repair, with "images", the "rule" that flags in these
    figures, the "expected_false_positive_rate" with --fpr, the name of the anomaly "score", and the
    "scores", ascending.
    finding: whether B looks backdoored, a Finding as a dict of its clearest classes.
    poisoned: {"file", "sha256", "images"} of each poisoned dataset; None in records of version
    0.2.0 and older, whose attack_success_rate has paths in the place of the names.
    class_names: of the N classes, where the dataset's folders or --labels gave them.
    """

    # parse_record passes these types to isinstance: plain classes or unions, no list[int].
    tool_version: str
    libraries: dict
    badnet: dict
    data: dict
    settings: dict
    input_scale: str
    layer: str
    channels: int
    order: list
    mean_activation: list
    pruned: list
    accuracy: dict
    attack_success_rate: dict
    moved: dict
    holdout: dict | None = None
    finding: dict | None = None
    poisoned: list | None = None
    class_names: list | None = None

    def describe(self) -> dict[str, Any]:
        """Return the record as a dict that JSON can hold."""
        values = dataclasses.asdict(self)
        if self.class_names is None:  # so that G without names stays the same file
            del values["class_names"]
        return values

    def to_json(self) -> str:
        return json.dumps(self.describe(), allow_nan=False)

    def list_facts(self, classes: int, threshold: float | None, path: Path) -> dict[str, Any]:
        """Return what a Detector says of G's repair, by the names of its fields.

        classes: N.  threshold: the detector's.  path: of G's file, for messages.
        Raise InputError where they are damaged.
        """
        flags_by_score = threshold is not None
        return {
            "held_out": self.held_out(path) if flags_by_score else None,
            "repaired_with": self.data,
            "better_rate": None if flags_by_score else self.find_better_rate(),
            "hardened": self.is_hardened(),
            "class_names": self.names(classes, path),
        }

    def names(self, classes: int, path: Path) -> list[str] | None:
        """Return the names of the N classes, or None. path: of G's file, for messages.

        Raise InputError where they are damaged.
        """
        names = self.class_names
        if names is not None and not (len(names) == classes and all(map(is_name, names))):
            _refuse_damaged(path)
        return names

    def held_out(self, path: Path) -> list[float] | None:
        """Return the anomaly scores of the held-out clean images, ascending, or None.

        path: of G's file, for messages.  Raise InputError where they are damaged.
        """
        if self.holdout is None:
            return None
        if self.holdout.get("score") != self.name_score():
            raise InputError(
                f"{path}: its held-out scores are of another version of the anomaly score; repair "
                "the BadNet again"
            )
        return _check_scores(self.holdout, path)

    def name_score(self) -> str:
        """Return the name of the anomaly score of B and this G."""
        return detector.name_score(self.is_hardened())

    def is_hardened(self) -> bool:
        """Return whether G was hardened."""
        return bool(self.settings.get("harden"))

    def find_better_rate(self) -> float | None:
        """Return the rate for --fpr, where G was hardened and has the scores for one; else None.

        The scores of a G that was not hardened often tell no more than disagreement does.
        """
        holdout = self.holdout or {}
        scores, same = holdout.get("scores"), holdout.get("score") == self.name_score()
        if not (self.is_hardened() and same and isinstance(scores, list) and scores):
            return None
        return max(figures.USUAL_RATE, figures.find_lowest_rate(len(scores)))

    def threshold(self, rate: float, path: Path) -> float:
        """Return the anomaly score that at most this fraction of new clean images exceeds.

        It is the fraction on average, as `figures.choose_threshold` describes.
        rate: above 0, at most 1.  path: of G's file, for messages.
        Raise InputError where no images were held out, or too few for the rate.
        """
        scores = self.held_out(path)
        if scores is None:
            raise no_threshold_error(path)
        threshold = figures.choose_threshold(scores, rate)
        if threshold is None:
            raise InputError(
                f"{path}: --fpr {rate} needs {figures.count_needed(rate)} held-out clean images, "
                f"and the repair held out {len(scores)}; give --fpr "
                f"{figures.find_lowest_rate(len(scores)):g} or more, or repair the BadNet again "
                "with a larger --holdout"
            )
        return threshold


def no_threshold_error(path: Path) -> InputError:
    """Return the InputError for a repair that held out no clean images. path: of G's file."""
    return InputError(
        f"{path}: --fpr needs clean images that the repair has not seen, and none were held out; "
        "repair the BadNet again with: repair.py MODEL DATA --holdout 0.1"
    )


def _check_scores(holdout: dict, path: Path) -> list[float]:
    scores = holdout.get("scores")
    if isinstance(scores, list) and scores:
        floats = all(isinstance(score, float) for score in scores)
        limit = detector.MAX_SCORE
        if floats and scores == sorted(scores) and 0 <= scores[0] <= scores[-1] <= limit:
            return scores
    _refuse_damaged(path)


def make_record(
    observer: Any,
    net: "CachedNet",
    badnet: ModelFile,
    sources: Sequence[dict],
    settings: Any,
    class_names: list[str] | None = None,
) -> RepairRecord:
    """Make the record of a finished repair.

    observer: the Observer of the repair.  net: G on the validation set.
    sources: {"file", "sha256"} of the clean dataset, then of each of the observer's poisoned ones.
    settings: beyond.settings.Settings.  class_names: of the dataset's folders, or of --labels.
    """
    import importlib.metadata  # here, for the time that it takes

    data, *poisoned = [
        source | {"images": len(images)}
        for source, images in zip(sources, (net.data, *observer.poisoned), strict=True)
    ]
    names, rates = name_datasets(poisoned), observer.attack_success_rate
    order = observer.order
    return RepairRecord(
        tool_version=VERSION,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        badnet={"file": badnet.path.name, "sha256": badnet.sha256},
        data=data,
        settings=settings.to_record(),
        input_scale=net.scale,
        layer=net.split.name,
        channels=len(order),
        order=order,
        mean_activation=net.mean_activation.tolist(),
        pruned=net.masked,
        accuracy=observer.accuracy,
        attack_success_rate={step: dict(zip(names, rates[step], strict=True)) for step in rates},
        moved=observer.moved,
        holdout=observer.holdout,
        finding=observer.finding and observer.finding.brief(),
        poisoned=list(dict(zip(names, poisoned)).values()),
        class_names=fit_names(class_names),
    )


def fit_names(class_names: list[str] | None) -> list[str] | None:
    """Return the names of the classes, or None where they are too long to be read again."""
    return class_names if len(json.dumps(class_names)) <= NAMES_LENGTH else None


def name_datasets(datasets: Sequence[dict]) -> list[str]:
    """Return a name for each dataset: its file's, or with its SHA-256's first digits if shared.

    datasets: with "file", without a directory, and "sha256". The same file and contents get the
    same name; all others get different ones.
    """
    pairs = [(data["file"], data["sha256"]) for data in datasets]
    files = [file for file, _ in {*pairs}]
    names = [
        file if files.count(file) == 1 else f"{file} ({digest[:DIGITS]})" for file, digest in pairs
    ]
    if len({*names}) < len({*pairs}):  # somebody made them collide
        names = [f"{file} ({digest})" for file, digest in pairs]
    return names


def parse_record(text: str, path: Path) -> RepairRecord | None:
    """Return the record in a JSON text, or None for null. path: of the file, for messages.

    Raise InputError where it is not a record, or lacks what using G needs.
    """
    values = guard.parse_json(text, path)
    if values is None:
        return None
    if not isinstance(values, dict):
        _refuse_damaged(path)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(RepairRecord):
        field_type: Any = field.type
        fields[field.name] = values.get(field.name)
        if not isinstance(fields[field.name], field_type):
            _refuse_damaged(path)
    record = RepairRecord(**fields)
    names_badnet = all(isinstance(record.badnet.get(key), str) for key in ("file", "sha256"))
    if record.input_scale not in pixels.SCALES or not names_badnet:
        _refuse_damaged(path)
    return record


def _refuse_damaged(path: Path) -> NoReturn:
    raise InputError(f"{path}: its repair record is damaged; repair the BadNet again")


def read_record(model_file: ModelFile) -> RepairRecord | None:
    """Read the record that a repaired net's file carries. Return None where there is none.

    Raise InputError as `parse_record` does.
    """
    path = model_file.path
    if path.suffix == ".keras":
        return None
    text = model_file.read_hdf5(lambda file: read_text(file, ATTRIBUTE, path))
    if text is None:
        return None
    return parse_record(text, path) or _refuse_damaged(path)


def describe_repaired(path: Path, max_bytes: int) -> str:
    """Say when a repaired net was written, and what it was made from, if its file tells."""
    day = datetime.date.fromtimestamp(path.stat().st_mtime)
    try:
        record = read_record(read_model(path, max_bytes))
    except InputError:
        record = None
    if record is None:
        return f"written on {day}"
    harden = " with --harden" if record.is_hardened() else ""
    return f"made from {record.badnet['file']}{harden} on {day}"


def refuse_repaired(model_file: ModelFile) -> None:
    """Raise InputError where a BadNet's file carries a record: it is a repaired net."""
    record = read_record(model_file)
    if record is not None:
        raise InputError(
            f"{model_file.path}: is a repaired net, which repair.py made from "
            f"{record.badnet['file']}; give that BadNet"
        )
