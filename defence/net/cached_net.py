"""A net cut in two, with a dataset's features between the halves: prune and train from there.

Pruning, retraining and fine-tuning leave all layers up to the pruned one as they are. So the trunk
runs over the images once, and everything that changes the head or masks a channel starts from its
output. That is exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.limits import allocate
from defence.base.progress import say, track
from defence.base.text import format_count, format_percent
from defence.net.inference import classify, compile_model, map_in_parallel
from defence.net.split import Split, compute_masked_features

# How much more accurate other pixels must be than 0..1. A net for 0..1 answers most images alike at
# 0..255, and by chance a few better; a net for 0..255 is right on almost none at 0..1.
MIN_GAIN = 0.05
FEATURES = "the features of all images"


class LabelledImages(Protocol):
    """Images to run a net on; load.datasets.Dataset is one."""

    path: Path
    max_bytes: int
    labels: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def batch_count(self) -> int: ...
    def __len__(self) -> int: ...
    def batches(self, scale: str = ...) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...
    def spread_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


class CachedNet:
    """A net and a dataset, and between them the features that the net's trunk makes of the images.

    split: the net, cut in two.  data: the images.  scale: the net's pixels, a key of pixels.SCALES.
    features: float32 (n, …, C); masked channels are overwritten.  labels: int64 (n,), 0..N-1.
    mean_activation: float64 (C,), of each channel of the layer to prune, over all images and
    positions.  masked: channels in the order in which they were masked.
    classes: int64 (n,), 0..N-1, the net's answers as it is now.
    rival: another scale that serves the net as well, or None.
    rng: draws the order of the images while the net is trained.
    """

    def __init__(
        self,
        split: Split,
        data: LabelledImages,
        scale: str,
        features: np.ndarray,
        mean_activation: np.ndarray,
        rival: str | None = None,
        seed: int = 0,
    ) -> None:
        self.split, self.data, self.scale, self.rival = split, data, scale, rival
        self.features, self.labels = features, data.labels
        self.mean_activation = mean_activation
        masked = compute_masked_features(split)
        self.masked_values = np.broadcast_to(masked, (1, *features.shape[1:]))
        self.masked: list[int] = []
        self.classes: np.ndarray
        self.rng = np.random.default_rng(seed)
        self.refresh()

    @classmethod
    def from_dataset(
        cls, split: Split, clean: LabelledImages, scale: str | None = None, seed: int = 0
    ) -> CachedNet:
        """Run the trunk over a clean dataset. scale: of its pixels; None: the one that fits best.

        Raise InputError where the features do not fit in memory or on disk, or are not finite.
        """
        if scale:
            pixels.check_scale(scale, split.trunk.input_shape[3])
            return cls(split, clean, scale, *extract_features(split, clean, scale), seed=seed)
        return cls(split, clean, *choose_scale(split, clean), seed=seed)

    def for_dataset(self, data: LabelledImages) -> CachedNet:
        """Return the same net, sharing the split, on another dataset."""
        extracted = extract_features(self.split, data, self.scale)
        return CachedNet(self.split, data, self.scale, *extracted)

    def accuracy(self) -> float:
        """Return the fraction of images, 0..1, that the net answers with their label."""
        return float(np.mean(self.classes == self.labels))

    def mask(self, channel: int) -> None:
        """Overwrite a channel's features with their values when it is pruned.

        Only images in which the channel was not silent are run again.
        """
        original = self.features[..., channel].copy()
        masked = self.masked_values[..., channel]
        differs = (original != masked).reshape(len(original), -1).any(axis=1)
        self._undo = original, self.classes.copy()
        self.features[..., channel] = masked
        rows = np.flatnonzero(differs)
        self.classes[rows] = classify(self.split.head, self.features, rows)
        self.masked.append(int(channel))

    def undo(self) -> None:
        """Take back the channel that was masked last."""
        original, self.classes = self._undo
        self.features[..., self.masked.pop()] = original

    def refresh(self) -> None:
        """Compute the classes again, after training changed the head."""
        self.classes = classify(self.split.head, self.features)

    def recompute_features(self) -> None:
        """Compute features and classes again, after training changed the trunk."""
        self.features, _ = extract_features(self.split, self.data, self.scale)
        self.refresh()


def choose_scale(
    split: Split, clean: LabelledImages
) -> tuple[str, np.ndarray, np.ndarray, str | None]:
    """Find the pixels that a net was trained on, by its accuracy on a clean dataset.

    All images are run at the scale that serves the first batch best. At the others, only as many
    are run as it takes to see that none of them can win; they are taken evenly. A scale other than
    pixels.DEFAULT must win by MIN_GAIN over that, and over answering always the same class.
    Return (scale, features, mean activation, rival): a key of pixels.SCALES, the two that
    `extract_features` returns for it, and a scale that serves the net as well or better, or None.
    """
    scales, count = pixels.list_scales(split.trunk.input_shape[3]), len(clean)
    margin = {name: 0 if name == pixels.DEFAULT else MIN_GAIN for name in scales}
    least = np.max(np.bincount(clean.labels)) + MIN_GAIN * count

    def count_right(name: str, x: np.ndarray, rows: np.ndarray) -> int:
        features = np.asarray(compile_model(split.trunk)(pixels.scale_pixels(x, name))[0])
        return int(np.sum(classify(split.head, features) == clean.labels[rows]))

    x, rows = next(clean.spread_batches())
    scale, *other_scales = sorted(
        scales, key=lambda name: margin[name] * len(rows) - count_right(name, x, rows)
    )
    extracted = extract_features(split, clean, scale)
    right = classify(split.head, extracted[0]) == clean.labels
    good = scale == pixels.DEFAULT or np.sum(right) > least
    own = np.sum(right) - margin[scale] * count if good else -np.inf
    needed = {name: own + margin[name] * count for name in other_scales}
    needed |= {name: max(needed[name], least) for name in other_scales if name != pixels.DEFAULT}

    hits, run_count, own_hits = dict.fromkeys(other_scales, 0), 0, 0
    for x, rows in track(clean.spread_batches(), "other pixels", clean.batch_count):
        run_count += len(rows)
        own_hits += int(np.sum(right[rows]))
        for name in other_scales:
            hits[name] += count_right(name, x, rows)
        if all(hits[name] + count - run_count <= needed[name] for name in other_scales):
            break
    hits[scale] = own_hits
    accuracy = {name: hits[name] / run_count for name in scales}
    listing = ", ".join(f"{name} {format_percent(accuracy[name])}" for name in scales)
    some = f"{run_count} of " if run_count < count else ""
    evenly = ", taken evenly," if some else ""
    say(f"accuracy on {some}{format_count(count, 'image')}{evenly} with pixels {listing}")
    best = max(other_scales, key=lambda name: hits[name] - needed[name])
    if hits[best] > needed[best]:
        scale, extracted = best, extract_features(split, clean, best)
    rivals = [name for name in scales if name != scale and accuracy[name] >= accuracy[scale] > 0]
    return scale, *extracted, rivals[0] if rivals else None


def extract_features(
    split: Split, data: LabelledImages, scale: str
) -> tuple[np.ndarray, np.ndarray]:
    """Run the trunk of a net once over a dataset.

    Return (features, mean activation): float32 (n, …, C), the head's input, and float64 (C,), the
    mean over all images and positions of each channel's activation in the layer to prune.
    Raise InputError where an activation is not finite.
    """
    shape = (len(data), *split.trunk.output_shape[0][1:])
    features = allocate(shape, np.float32, data.path, FEATURES, data.max_bytes)
    activation = np.zeros(features.shape[-1])
    start = 0
    images = (x for x, _ in data.batches(scale))
    batches = map_in_parallel(compile_model(split.trunk), images)
    for part, mean in track(batches, "features", data.batch_count):
        features[start : start + len(part)] = part
        activation += np.sum(mean, axis=0, dtype=np.float64)
        start += len(part)
    if not np.isfinite(activation).all():
        raise InputError(f"{data.path}: the model's feature maps are not finite for some images")
    return features, activation / len(data)
