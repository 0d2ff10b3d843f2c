"""The repair record: what made G and how it went, as G's file carries it.

It is made, checked, written and read here and nowhere else. It holds nothing that varies from run
to run, so that the same repair gives the same file, byte for byte.
"""

import dataclasses
import datetime
import json
import math

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.text import format_count
from defence.judge import detector, figures
from defence.load import guard
from defence.load.guard_hdf5 import read_text
from defence.load.models import read_model

VERSION = "0.2.0"
ATTRIBUTE = "repair_record"  # of the root of G's file
LIBRARIES = ("tensorflow", "keras", "numpy", "h5py")
STEPS = ("before", "pruned", "retrained", "fine_tuned", "hardened")


@dataclasses.dataclass
class RepairRecord:
    """What a repair was made from and what it did; channels and classes count from 0.

    tool_version: text.  libraries: {name: version}.
    badnet: {"file", "sha256"}.  data: {"file", "sha256", "images"}.  settings: {name: value}.
    input_scale: a key of pixels.SCALES.  layer: whose feature map was pruned.  channels: of it.
    order: its channels by ascending mean activation.  mean_activation: of each channel.
    pruned: channels in the order they were pruned.
    accuracy: {step: 0..1, "after_each_channel": [0..1, …], "after_each_round": [0..1, …]} on data;
    steps are before, pruned, retrained, fine_tuned, hardened.
    attack_success_rate: the same steps and "after_each_channel", each {file: as above}.
    moved: {"answers", "weights"}: how far G is from B.
    holdout: figures of images kept out of the repair, with "images", the anomaly "score" that was
    used, and the "scores", ascending; or None.
    finding: whether B looks backdoored, a Finding as a dict of its clearest classes; or None.
    """

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
    holdout: dict = None
    finding: dict = None

    def to_json(self):
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def held_out(self, path):
        """The anomaly scores of the held-out clean images, ascending: [float, …], or None.

        path: of G's file, for messages.  Raises InputError where they are damaged.
        """
        return None if self.holdout is None else _check_scores(self.holdout, path)

    def threshold(self, rate, path):
        """The anomaly score that this fraction of the held-out clean images exceeded.

        rate: above 0, at most 1.  path: of G's file, for messages.
        Raises InputError where no images were held out, or too few for the rate.
        """
        scores = self.held_out(path)
        if scores is None:
            raise no_threshold_error(path)
        if rate < 1 / len(scores):
            least = math.ceil(1e4 / len(scores)) / 1e4
            raise InputError(
                f"{path}: --fpr {rate:g}: must be {least:g} or more, with "
                f"{format_count(len(scores), 'clean image')} held out"
            )
        return figures.find_threshold(scores, rate)


def no_threshold_error(path):
    """The InputError for a G that no clean images were held out for. path: of its file."""
    return InputError(
        f"{path}: --fpr needs clean images that the repair has not seen, and none were held out; "
        "repair the BadNet again with: repair.py --holdout 0.1"
    )


def _check_scores(holdout, path):
    scores = holdout.get("scores")
    if holdout.get("score") == detector.SCORE and isinstance(scores, list) and scores:
        numbers = all(isinstance(each, float) for each in scores)
        if numbers and scores == sorted(scores) and 0 <= scores[0] <= scores[-1] <= detector.MOST:
            return scores
    raise InputError(
        f"{path}: its repair record is damaged or of another version; repair the BadNet again"
    )


def make_record(observer, net, badnet, data, settings):
    """The record of a finished repair.

    observer: the Observer of it.  net: the CachedNet it left.  badnet: B's ModelFile.
    data: {"file", "sha256", "images"} of the clean dataset.  settings: the dataclass of them.
    """
    import importlib.metadata  # here, for the time that it takes

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
        attack_success_rate=observer.attack_success_rate,
        moved=observer.moved,
        holdout=observer.holdout,
        finding=observer.finding and observer.finding.brief(),
    )


def parse_record(text, path):
    """The record in a text of JSON, or None for null. path: of the file, for messages.

    Raises InputError where it is not a record, or what is needed to use G is missing from it.
    """
    values = guard.parse_json(text, path)
    if values is None:
        return None
    if not isinstance(values, dict):
        _damaged(path)
    known = {}
    for field in dataclasses.fields(RepairRecord):
        known[field.name] = value = values.get(field.name)
        missing = value is None and field.default is None
        if not (missing or isinstance(value, field.type)):
            _damaged(path)
    record = RepairRecord(**known)
    texts = [record.badnet.get("file"), record.badnet.get("sha256")]
    if record.input_scale not in pixels.SCALES or not all(isinstance(each, str) for each in texts):
        _damaged(path)
    return record


def _damaged(path):
    raise InputError(f"{path}: its repair record is damaged; repair the BadNet again")


def read_record(model_file):
    """The record that the ModelFile of a repaired net carries, or None where there is none.

    Raises InputError as `parse` does.
    """
    path = model_file.path
    if path.suffix == ".keras":
        return None
    with model_file.open_hdf5() as file, guard.inspect_file(path, model_file.max_bytes):
        text = read_text(file, ATTRIBUTE, path)
    if text is None:
        return None
    return parse_record(text, path) or _damaged(path)


def describe_repaired(path, max_bytes):
    """When a repaired net was written, and what it was made from, as far as its file tells."""
    day = datetime.date.fromtimestamp(path.stat().st_mtime)
    try:
        found = read_record(read_model(path, max_bytes))
    except InputError:
        found = None
    if found is None:
        return f"a file of {day}"
    harden = " with --harden" if found.settings.get("harden") else ""
    return f"made from {found.badnet['file']}{harden} on {day}"


def refuse_repaired(model_file):
    """Raise InputError where the ModelFile of a BadNet carries a record: it is a repaired net."""
    found = read_record(model_file)
    if found is not None:
        raise InputError(
            f"{model_file.path}: is a repaired net, which repair.py made from "
            f"{found.badnet['file']}; give that BadNet"
        )
