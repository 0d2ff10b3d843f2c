"""The detector: B and G as one function, the anomaly score, the verdict.

Only this module says what flags an image and what is printed about it. Keras runs the function
that `build_detector` makes of the two nets; onnx_file.py writes it as a file for ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.startup import import_keras
from defence.base.text import format_percent
from defence.load.class_names import name_class
from defence.net import graph
from defence.net.split import (
    Split,
    UnfitNet,
    compute_masked_features,
    find_pruned_channels,
    list_channel_weights,
    split_net,
)

DISAGREEMENT = "flagging images on which B and G disagree"  # the rule without a threshold
SCORE = "1.2 KL(B, G) + KL(G, B)"  # see `name_score`
BADNET_WEIGHT = 1.2  # of KL(B, G)
MIN_PROBABILITY = 1e-12  # the score counts a smaller probability as this
MAX_SCORE = float(np.float32(-(BADNET_WEIGHT + 1) * math.log(MIN_PROBABILITY)))
VIEWS = 3  # of an image, which a hardened G answers for the score: see `shift_images`


# ------------------------------------------------------------------------------------- verdicts


@dataclasses.dataclass
class Answers:
    """The answers of B and G to some images.

    badnet, repaired: int (n,), the classes, 0..N-1; -1 where a net gave NaN.
    score: float32 (n,), the anomaly score, from 0 to MAX_SCORE.
    flagged: bool (n,), whether it counts as poisoned; by default where the nets disagree.
    """

    badnet: np.ndarray
    repaired: np.ndarray
    score: np.ndarray
    flagged: np.ndarray = None  # type: ignore[assignment]  # __post_init__ fills it

    def __post_init__(self) -> None:
        if self.flagged is None:
            self.flagged = is_flagged(self.badnet, self.repaired, self.score)

    @classmethod
    def concatenate(cls, parts: Iterable[Answers]) -> Answers:
        """Join the answers to batch after batch; there may be none."""
        classes = np.empty(0, np.int64)
        empty = cls(classes, classes, np.empty(0, np.float32), np.empty(0, bool))
        columns = zip(*(vars(part).values() for part in [empty, *parts]))
        return cls(*map(np.concatenate, columns))

    @classmethod
    def from_columns(
        cls,
        verdicts: np.ndarray,
        badnet: np.ndarray,
        repaired: np.ndarray,
        score: np.ndarray,
        classes: int,
    ) -> Answers:
        """Turn printed columns back into answers: the reverse of `describe_answers`.

        verdicts: int (n,), 1..N+1.  badnet, repaired: int (n,), 1..N, 0 where a net gave NaN.
        score: float32 (n,).  classes: N.
        """
        return cls(badnet - 1, repaired - 1, score, verdicts == classes + 1)


def is_flagged(badnet: Any, repaired: Any, score: Any, threshold: float | None = None) -> Any:
    """Return whether images count as poisoned: bool (n,), NumPy or TensorFlow like the arguments.

    badnet, repaired, score: as in Answers.  threshold: flag a score above it; if None, flag an
    image on which the nets disagree. An image for which a net gave NaN is always flagged.
    """
    suspect = badnet != repaired if threshold is None else score > threshold
    return suspect | ~((badnet > -1) & (repaired > -1))


def compute_verdict(badnet: Any, flagged: Any, classes: int, where: Callable = np.where) -> Any:
    """Return the verdicts: N + 1, "poisoned", for flagged images, else B's class, 1..N.

    badnet, flagged: as in Answers.  classes: N.  where: np.where, or tf.where for tensors.
    Without a threshold, an image that is not flagged has the same class from both nets.
    Source: report, section 2, last paragraph.
    """
    return where(~flagged, badnet, classes) + 1


@dataclasses.dataclass
class Detector:
    """B and G as one function, and the rule that flags.

    run: float32 (n, height, width, channels), 0..255 → arrays of badnet, repaired, score, as in
    Answers.  classes: N.  shape: (height, width, channels).  threshold: as for is_flagged.
    path: of its file, or of B's, for messages.  sha256: {"badnet", "repaired"}, of their files.
    held_out: where there is a threshold, the anomaly scores of the clean images that G's repair
    kept out; None where it kept none.
    repaired_with: {"file", "sha256", "images"} of the dataset that G was repaired with.
    better_rate: for --fpr, where G's scores tell more than the rule does; else None.
    hardened: whether G was hardened; None where no repair record tells.
    class_names: of the N classes, where G's record has them.
    """

    run: Callable[[np.ndarray], Iterable[Any]]
    classes: int
    shape: tuple[int, ...]
    threshold: float | None
    path: Path
    sha256: dict[str, str]
    held_out: list[float] | None = None
    repaired_with: dict[str, Any] | None = None
    better_rate: float | None = None
    hardened: bool | None = None
    class_names: list[str] | None = None

    def judge(self, images: np.ndarray) -> Answers:
        """Judge images, float32 (n, height, width, channels), 0..255."""
        badnet, repaired, score = map(np.asarray, self.run(images))
        flagged = is_flagged(badnet, repaired, score, self.threshold)
        return Answers(badnet, repaired, score, flagged)

    def require_images(self) -> None:
        """Raise InputError unless an image file can be its input: grey or RGB."""
        if self.shape[2] not in (1, 3):
            raise InputError(
                f"{self.path}: takes images of {self.shape[2]} channels, and image files have 1 "
                "or 3; give a dataset"
            )

    def describe(self) -> dict[str, Any]:
        """Return which nets judge, and by which rule, as a dict that JSON can hold."""
        return {"sha256": self.sha256, "threshold": self.threshold, "rule": self.rule}

    @property
    def rule(self) -> str:
        """The rule that flags an image, in words."""
        if self.threshold is None:
            return DISAGREEMENT
        above = f"flagging images whose anomaly score is above {self.threshold:.4g}"
        if self.held_out is None:
            return above
        count, total = sum(score > self.threshold for score in self.held_out), len(self.held_out)
        expected = format_percent((count + 1) / (total + 1))
        return (
            f"{above}, which {count} of {total} held-out clean images exceed, and at most "
            f"{expected} of new ones on average"
        )


def describe_better(rate: float) -> str:
    """Say which --fpr would judge better than disagreement does."""
    return f"G is hardened, so add --fpr {rate:g}: anomaly scores tell more than disagreement does"


def name_rule(threshold: float | None) -> str:
    """Return the rule that flags, in a few words, to stand beside a rate."""
    return "B and G disagree" if threshold is None else f"score > {threshold:.3g}"


def describe_answers(
    answers: Answers, classes: int, class_names: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what is written about each image, a dict; its classes count from 1.

    class_names: if None, "class_name" is left out.
    """
    verdicts = compute_verdict(answers.badnet, answers.flagged, classes)
    columns = answers.badnet, answers.repaired, answers.score, verdicts
    for badnet, repaired, score, verdict in zip(*(column.tolist() for column in columns)):
        row = {
            "class": verdict,
            "badnet_class": badnet + 1 if badnet >= 0 else None,
            "repaired_class": repaired + 1 if repaired >= 0 else None,
            "score": score,
        }
        yield row | ({"class_name": name_class(verdict, class_names)} if class_names else {})


# ------------------------------------------------------------------------------------ the score


def compute_probabilities(scores: Any, model: Any) -> Any:
    """Turn a classifier's scores, float (n, N), into probabilities: a float32 tensor.

    Its rows sum to 1. They are the softmax where the scores are logits. A row that is not finite
    becomes NaN.
    """
    import tensorflow as tf

    scores = tf.cast(scores, tf.float32)
    finite = tf.reduce_all(tf.math.is_finite(scores), axis=1, keepdims=True)
    scores = tf.where(finite, scores, math.nan)
    if graph.gives_logits(model):
        return tf.nn.softmax(scores)
    scores = tf.maximum(scores, 0)
    return scores / tf.maximum(tf.reduce_sum(scores, axis=1, keepdims=True), 1e-30)


def name_score(hardened: bool) -> str:
    """Return the anomaly score's name, as records and detectors' files have it.

    hardened: whether G is hardened.
    """
    return f"{SCORE}, G's mean of {VIEWS} views" if hardened else SCORE


def score_anomaly(badnet: Any, repaired: Any) -> Any:
    """Return how far apart the answers of B and G are: a float32 tensor (n,).

    badnet, repaired: float32 (n, N), as `compute_probabilities` or `average_views` returns them.
    The score is 1.2 KL(B, G) + KL(G, B), in nats, from 0 for the same answers to MAX_SCORE. The
    Jeffreys divergence has 1 in the place of 1.2; so the score is higher where B is unsure and G is
    sure of another class. Probabilities below MIN_PROBABILITY count as that much. Where a net gave
    NaN, the score is MAX_SCORE.
    Source: S. Kullback, R. Leibler, Ann. Math. Stat. 22, 1951; the weight is ours.
    """
    import tensorflow as tf

    b, g = (tf.maximum(probabilities, MIN_PROBABILITY) for probabilities in (badnet, repaired))
    divergence = tf.reduce_sum((BADNET_WEIGHT * b - g) * tf.math.log(b / g), axis=1)
    bounded = tf.minimum(tf.maximum(divergence, 0.0), MAX_SCORE)
    return tf.where(tf.math.is_nan(divergence), MAX_SCORE, bounded)


def shift_images(images: Any) -> list:
    """Return images as they are, and moved one pixel to the right and to the left.

    images: (n, height, width, channels), a NumPy array or a TensorFlow tensor; so are the VIEWS
    items of the list. The column that becomes free repeats its neighbour.
    """
    import tensorflow as tf

    join = np.concatenate if isinstance(images, np.ndarray) else tf.concat
    right = join([images[:, :, :1], images[:, :, :-1]], 2)
    left = join([images[:, :, 1:], images[:, :, -1:]], 2)
    return [images, right, left]


def average_views(probabilities: Any) -> Any:
    """Return G's mean answer to images from its answers to their views: a float32 tensor (n, N).

    probabilities: float32 (VIEWS, n, N), as `compute_probabilities` returns them, in the order of
    `shift_images`. The mean is geometric, and made to sum to 1. Clean images on which G errs by
    chance then score less. B answers the image itself alone, since its backdoor may work on one of
    the views only.
    """
    import tensorflow as tf

    logarithms = tf.math.log(tf.maximum(probabilities, MIN_PROBABILITY))
    return tf.nn.softmax(tf.reduce_mean(logarithms, axis=0))


# ------------------------------------------------------------------------------ B and G as one


def build_detector(
    badnet: Any, repaired: Any, scale: str, layer_name: str | None = None, hardened: bool = False
) -> Any:
    """Join B and G to one Keras model: images (n, height, width, channels), 0..255 → answers.

    The answers are badnet, repaired and score, as in Answers, the classes int32. Where G gave NaN
    for any view, its class is -1.
    scale: a key of pixels.SCALES.  layer_name, hardened: as for `build_joint_model`.
    """
    keras = import_keras()
    import tensorflow as tf

    def classify(scores: Any, broken: Any) -> Any:
        return tf.where(broken, -1, tf.argmax(scores, 1, tf.int32))

    def answer(scores: Any) -> list:
        badnet_scores, repaired_scores = scores
        b = compute_probabilities(badnet_scores, badnet)
        g = compute_probabilities(repaired_scores, repaired)
        g_broken = tf.math.is_nan(g[:, 0])
        if hardened:
            shape = VIEWS, -1, g.shape[1]
            repaired_scores = tf.reshape(repaired_scores, shape)[0]
            g = average_views(tf.reshape(g, shape))
            g_broken = tf.reduce_any(tf.reshape(g_broken, shape[:2]), axis=0)
        return [
            classify(badnet_scores, tf.math.is_nan(b[:, 0])),
            classify(repaired_scores, g_broken),
            score_anomaly(b, g),
        ]

    images = keras.Input(badnet.input_shape[1:], name="images")
    scaled = keras.layers.Lambda(lambda x: pixels.scale_pixels(x, scale), name="scaled")(images)
    scores = build_joint_model(badnet, repaired, layer_name, hardened)(scaled)
    return keras.Model(images, keras.layers.Lambda(answer, name="answers")(scores))


def build_joint_model(
    badnet: Any, repaired: Any, layer_name: str | None = None, hardened: bool = False
) -> Any:
    """Join B and G to one model: scaled images (n, height, width, channels) → scores of both.

    B's scores are (n, N). So are those of a G that is not hardened. Where G's trunk is B's with
    channels pruned, it runs once for both. A hardened G's scores are (VIEWS n, N), of one view of
    all images after the other.
    layer_name: the layer G was pruned at, None where that is not known.
    """
    keras = import_keras()
    import tensorflow as tf

    whole = keras.Model(repaired.input, repaired.output, name="repaired-net")
    if hardened:
        shift = keras.layers.Lambda(lambda x: tf.concat(shift_images(x), 0), name="views-of-images")
        return keras.Model(badnet.input, [badnet.output, whole(shift(badnet.input))])
    try:
        b, g = (split_net(net, layer_name) for net in (badnet, repaired))
        pruned = compare_trunks(b, g)
    except UnfitNet:  # another tool may have repaired a net that this one cannot
        pruned = None
    if pruned is None:
        return keras.Model(badnet.input, [badnet.output, whole(badnet.input)])
    features = b.trunk.output[0]
    unpruned = np.ones(features.shape[-1], np.float32)
    unpruned[pruned] = 0
    masked = compute_masked_features(g) * (1 - unpruned)
    mask = keras.layers.Lambda(lambda x: x * unpruned + masked, name="masked-features")
    return keras.Model(b.net.input, [b.net.output, g.head(mask(features))])


def compare_trunks(badnet: Split, repaired: Split) -> np.ndarray | None:
    """Return the channels that are pruned in G, int64 (k,).

    Return None where G's trunk differs from B's in anything else.
    """
    if (
        _describe_structure(badnet.net) != _describe_structure(repaired.net)
        or badnet.layer.name != repaired.layer.name
    ):
        return None
    pruned = find_pruned_channels(repaired.layer)
    axes = {id(variable): axis for variable, axis in list_channel_weights(badnet.layer)}
    for b_layer, g_layer in zip(badnet.trunk.layers, repaired.trunk.layers, strict=True):
        for b_weights, g_weights in zip(b_layer.weights, g_layer.weights, strict=True):
            values = np.array(b_weights)
            if id(b_weights) in axes:
                np.moveaxis(values, axes[id(b_weights)], -1)[..., pruned] = 0
            if not np.array_equal(values, g_weights):
                return None
    return pruned


def _describe_structure(model: Any) -> Any:
    """Return a model's layers and connections as a config, less what training may change."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: strip(part)
                for key, part in value.items()
                if key != "trainable" and not key.endswith("_initializer")
            }
        return [strip(part) for part in value] if isinstance(value, list) else value

    return strip(model.get_config()["layers"])
