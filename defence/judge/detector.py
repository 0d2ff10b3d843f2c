"""The detector: B and G as one function, the anomaly score, the verdict.

What flags an image, and what is printed of it, is defined here and nowhere else. Keras runs the
function that `build` makes of the two nets; onnx_file.py writes it as one file for ONNX Runtime.
"""

import dataclasses
import math

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.startup import import_keras
from defence.load.class_names import name_class
from defence.net import graph
from defence.net.split import (
    UnfitNet,
    compute_masked_features,
    find_pruned_channels,
    list_channel_weights,
    split_net,
)

SCORE = "Jeffreys divergence of B's and G's answers"  # a repair record names it
LEAST = 1e-12  # what a smaller probability counts as, in the score
MOST = float(np.float32(-2 * math.log(LEAST)))  # of the score


# ------------------------------------------------------------------------------------- verdicts


@dataclasses.dataclass
class Answers:
    """What B and G answer to some images.

    badnet, repaired: int (n,), the classes, 0..N-1; -1 where a net gave NaN.
    score: float32 (n,), the anomaly score, from 0 to MOST.
    flagged: bool (n,), whether it counts as poisoned; by default where the nets disagree.
    """

    badnet: np.ndarray
    repaired: np.ndarray
    score: np.ndarray
    flagged: np.ndarray = None

    def __post_init__(self) -> None:
        if self.flagged is None:
            self.flagged = is_flagged(self.badnet, self.repaired, self.score)

    @classmethod
    def concatenate(cls, parts):
        """Join the answers to batch after batch: [Answers, …], which may be empty."""
        none = cls(*np.empty((2, 0), np.int64), np.empty(0, np.float32), np.empty(0, bool))
        fields = zip(*(vars(part).values() for part in [none, *parts]))
        return cls(*map(np.concatenate, fields))

    @classmethod
    def from_columns(cls, verdicts, badnet, repaired, score, classes):
        """Turn what was printed back into answers: `describe_answers`, reversed.

        verdicts: int (n,), 1..N+1.  badnet, repaired: int (n,), 1..N, 0 where a net gave NaN.
        """
        return cls(badnet - 1, repaired - 1, score, verdicts == classes + 1)


def is_flagged(badnet, repaired, score, threshold=None):
    """Whether images count as poisoned: bool (n,), NumPy or TensorFlow as what is given.

    badnet, repaired, score: as in Answers.  threshold: flag a score above it; if None, flag an
    image on which the nets disagree. One for which a net gave NaN is always flagged.
    """
    suspect = badnet != repaired if threshold is None else score > threshold
    return suspect | ~((badnet > -1) & (repaired > -1))


def compute_verdict(badnet, flagged, classes, where=np.where):
    """What is printed: N + 1, "poisoned", for what is flagged, else B's class, 1..N.

    badnet, flagged: as in Answers.  classes: N.  where: np.where, or tf.where for tensors.
    Without a threshold an image is flagged where the nets disagree, so the class is that of both.
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
    repaired_with: {"file", "sha256", "images"} of the dataset that G was repaired with, or None.
    """

    run: object
    classes: int
    shape: tuple
    threshold: float
    path: object
    sha256: dict
    held_out: list = None
    repaired_with: dict = None

    def judge(self, images):
        """Judge images, float32 (n, height, width, channels), 0..255. Returns Answers."""
        answers = list(map(np.asarray, self.run(images)))
        return Answers(*answers, is_flagged(*answers, self.threshold))

    def require_images(self):
        """Raise InputError unless it takes what a picture can be made: grey or RGB."""
        if self.shape[2] not in (1, 3):
            raise InputError(f"{self.path}: takes images of {self.shape[2]} channels, not pictures")

    def describe(self):
        """What judged, as a dict that JSON can hold."""
        return {"sha256": self.sha256, "threshold": self.threshold, "rule": self.rule}

    @property
    def rule(self):
        """What flags an image, in words."""
        if self.threshold is None:
            return "flagging images on which B and G disagree"
        above = f"flagging images whose anomaly score is above {self.threshold:.4g}"
        if self.held_out is None:
            return above
        exceed = sum(score > self.threshold for score in self.held_out)
        return f"{above}, which {exceed} of {len(self.held_out)} held-out clean images exceed"


def describe_answers(answers, classes, class_names=None):
    """Yield what is written about each image, a dict, its class as printed; they count from 1.

    called: the classes' names, or None, which leaves out what the class is called.
    """
    for b, g, score, said in zip(
        answers.badnet.tolist(),
        answers.repaired.tolist(),
        answers.score.tolist(),
        compute_verdict(answers.badnet, answers.flagged, classes).tolist(),
    ):
        b, g = (each + 1 if each >= 0 else None for each in (b, g))
        row = {"class": said, "badnet_class": b, "repaired_class": g, "score": score}
        yield row | ({"class_name": name_class(said, class_names)} if class_names else {})


# ------------------------------------------------------------------------------------ the score


def compute_probabilities(scores, model):
    """A classifier's scores, float (n, N), as probabilities: a float32 tensor, rows that sum to 1.

    They are the softmax where the scores are logits. A row that is not finite becomes NaN.
    """
    import tensorflow as tf

    scores = tf.cast(scores, tf.float32)
    finite = tf.reduce_all(tf.math.is_finite(scores), axis=1, keepdims=True)
    scores = tf.where(finite, scores, math.nan)
    if graph.gives_logits(model):
        return tf.nn.softmax(scores)
    scores = tf.maximum(scores, 0)
    return scores / tf.maximum(tf.reduce_sum(scores, axis=1, keepdims=True), 1e-30)


def score_anomaly(of_badnet, of_repaired):
    """How far apart the answers of B and G are.

    of_badnet, of_repaired: float32 (n, N), as `probabilities` gives them.
    Returns a float32 tensor (n,), from 0 for the same answers to MOST: their Jeffreys divergence,
    in nats, probabilities below LEAST counting as that much. MOST where a net gave NaN.
    Source: H. Jeffreys, Proc. R. Soc. A 186, 1946; tests/tools/tried.py compares others.
    """
    import tensorflow as tf

    of_b, of_g = (tf.maximum(each, LEAST) for each in (of_badnet, of_repaired))
    apart = tf.reduce_sum((of_b - of_g) * tf.math.log(of_b / of_g), axis=1)
    return tf.where(tf.math.is_nan(apart), MOST, tf.minimum(apart, MOST))


# ------------------------------------------------------------------------------ B and G as one


def build_detector(badnet, repaired, scale, layer_name=None):
    """B and G as one Keras model: images (n, height, width, channels), 0..255 → answers.

    These are badnet, repaired and score, as in Answers, the classes int32.
    scale: a key of pixels.SCALES.  layer_name: as for `both`.
    """
    keras = import_keras()
    import tensorflow as tf

    def answer(scores):
        each_net = [compute_probabilities(*pair) for pair in zip(scores, (badnet, repaired))]
        classes = [
            tf.where(tf.math.is_nan(found[:, 0]), -1, tf.argmax(each, 1, tf.int32))
            for each, found in zip(scores, each_net)
        ]
        return [*classes, score_anomaly(*each_net)]

    images = keras.Input(badnet.input_shape[1:], name="images")
    scaled = keras.layers.Lambda(lambda x: pixels.scale_pixels(x, scale), name="scaled")(images)
    scores = build_joint_model(badnet, repaired, layer_name)(scaled)
    return keras.Model(images, keras.layers.Lambda(answer, name="answers")(scores))


def build_joint_model(badnet, repaired, layer_name=None):
    """B and G as one model: scaled images (n, height, width, channels) → both nets' scores, (n, N).

    Where G's trunk is B's with channels pruned, the trunk runs once for both.
    layer_name: the layer G was pruned at, None where that is not known.
    """
    keras = import_keras()
    try:
        of_b, of_g = (split_net(each, layer_name) for each in (badnet, repaired))
        pruned = compare_trunks(of_b, of_g)
    except UnfitNet:  # another tool may repair what this one cannot
        pruned = None
    if pruned is None:
        repaired = keras.Model(repaired.input, repaired.output, name="repaired-net")
        return keras.Model(badnet.input, [badnet.output, repaired(badnet.input)])
    features = of_b.trunk.output[0]
    keep = np.ones(features.shape[-1], np.float32)
    keep[pruned] = 0
    when_masked = compute_masked_features(of_g) * (1 - keep)
    mask = keras.layers.Lambda(lambda x: x * keep + when_masked, name="masked-features")
    return keras.Model(of_b.net.input, [of_b.net.output, of_g.head(mask(features))])


def compare_trunks(of_b, of_g):
    """The channels that are pruned in G, where G's trunk is otherwise B's; else None.

    of_b, of_g: the Splits of B and G.  Returns int64 (k,).
    """
    if (
        _describe_structure(of_b.net) != _describe_structure(of_g.net)
        or of_b.layer.name != of_g.layer.name
    ):
        return None
    pruned = find_pruned_channels(of_g.layer)
    axes = {id(variable): axis for variable, axis in list_channel_weights(of_b.layer)}
    for layer, other in zip(of_b.trunk.layers, of_g.trunk.layers, strict=True):
        for ours, theirs in zip(layer.weights, other.weights, strict=True):
            values = np.array(ours)
            if id(ours) in axes:
                np.moveaxis(values, axes[id(ours)], -1)[..., pruned] = 0
            if not np.array_equal(values, theirs):
                return None
    return pruned


def _describe_structure(model):
    """The config of a model's layers and how they are connected, less what training may change."""

    def strip(value):
        if isinstance(value, dict):
            return {
                key: strip(part)
                for key, part in value.items()
                if key != "trainable" and not key.endswith("_initializer")
            }
        return [strip(part) for part in value] if isinstance(value, list) else value

    return strip(model.get_config()["layers"])
