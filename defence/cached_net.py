"""A cut net with a dataset as its trunk's output: what pruning and training run on.

All up to the pruned layer is frozen while a net is pruned, retrained and fine-tuned, so the trunk
runs over the images once, and whatever changes the head or masks a channel starts from there.
"""

import numpy as np

from defence import guard, net
from defence.cli import InputError, counted, percent, say, track
from defence.inference import classify, compiled, parallel_map
from utils import SCALES

# What pixels 0..255 must gain in accuracy over 0..1. A net for 0..1 answers most images alike at
# 0..255, and by chance a few better; a net for 0..255 is right on almost none at 0..1.
MIN_GAIN = {"0..1": 0, "0..255": 0.05}


class CachedNet:
    """A net and a dataset, between them the features that the net's trunk makes of the images.

    split: net.Split.  data: Dataset.  scale: a key of SCALES, what the net takes pixels in.
    features: float32 (n, …, C), those of masked channels overwritten.  labels: int64 (n,), 0..N-1.
    mean_activation: float64 (C,), of each channel of the layer to prune, over all images and
    positions.  masked: channels in the order they were masked, [int, …].
    classes: int64 (n,), 0..N-1, what the net answers as it is now.
    """

    def __init__(self, split, data, scale, features, mean_activation):
        self.split, self.data, self.scale = split, data, scale
        self.features, self.labels = features, data.labels
        self.mean_activation = mean_activation
        self.when_masked = np.broadcast_to(net.masked_features(split), (1, *features.shape[1:]))
        self.masked, self._undo = [], None
        self.refresh()

    @classmethod
    def of(cls, split, clean):
        """The net on its clean dataset, at the pixel scale that serves it better.

        Raises InputError where the features would take too much memory, or are not finite.
        """
        check_memory(split, [clean])
        return cls(split, clean, *choose_scale(split, clean))

    def on(self, data):
        """The same net, sharing the split, on another Dataset."""
        return CachedNet(self.split, data, self.scale, *extract(self.split, data, self.scale))

    def accuracy(self):
        """The fraction of images, 0..1, that the net answers with their label."""
        return float(np.mean(self.classes == self.labels))

    def mask(self, channel):
        """Overwrite a channel's features by what they are when it is pruned.

        Only images in which the channel was not silent anyway are run again.
        """
        kept = self.features[..., channel].copy()
        when_masked = self.when_masked[..., channel]
        changed = (kept != when_masked).reshape(len(kept), -1).any(axis=1)
        self._undo = kept, self.classes.copy()
        self.features[..., channel] = when_masked
        rows = np.flatnonzero(changed)
        self.classes[rows] = classify(self.split.head, self.features, rows)
        self.masked.append(int(channel))

    def undo(self):
        """Take the channel back that was masked last."""
        kept, self.classes = self._undo
        self.features[..., self.masked.pop()] = kept

    def refresh(self):
        """Find the classes anew, after training changed the head."""
        self.classes = classify(self.split.head, self.features)

    def reread(self):
        """Find features and classes anew, after training changed the trunk."""
        self.features, _ = extract(self.split, self.data, self.scale)
        self.refresh()


def check_memory(split, datasets):
    """Raise InputError where the features of all images of Datasets together take too much."""
    size = 4 * int(np.prod(split.trunk.output_shape[0][1:])) * sum(map(len, datasets))
    first = datasets[0]
    guard.check_fits(first.path, "the features of all images", size, first.max_bytes)


def choose_scale(split, clean):
    """Find what a net was trained on, pixels 0..1 or 0..255, by its accuracy on a clean dataset.

    All images are run with the pixels that serve the first batch better; with the others, only as
    many as it takes to see that these cannot win on the whole. 0..255 must win by MIN_GAIN.
    Returns (scale, features, mean activation): a key of SCALES, and what `extract` returns for it.
    """

    def correct_in(x, y):
        features = np.asarray(compiled(split.trunk)(x)[0])
        return int(np.sum(classify(split.head, features) == y))

    def first_batch(scale):
        x, y = next(clean.batches(scale))
        return correct_in(x, y) - MIN_GAIN[scale] * len(y)

    scale, other = sorted(SCALES, key=first_batch, reverse=True)
    extracted = extract(split, clean, scale)
    right = classify(split.head, extracted[0]) == clean.labels

    enough = np.sum(right) + (MIN_GAIN[other] - MIN_GAIN[scale]) * len(clean)
    others = seen = 0
    for x, y in clean.batches(other):
        others += correct_in(x, y)
        seen += len(y)
        if others + len(clean) - seen <= enough:
            break
    say(
        f"accuracy on the first {counted(seen, 'image')}: with pixels {scale} "
        f"{percent(np.mean(right[:seen]))}, with pixels {other} {percent(others / seen)}"
    )
    return (other, *extract(split, clean, other)) if others > enough else (scale, *extracted)


def extract(split, data, scale):
    """Run the trunk of a net.Split once over a Dataset.

    Returns (features, mean activation): float32 (n, …, C), what the head takes, and float64 (C,),
    the mean over all images and positions of each channel's activation in the layer to prune.
    Raises InputError where one is not finite.
    """
    features = np.empty((len(data), *split.trunk.output_shape[0][1:]), np.float32)
    activation = np.zeros(features.shape[-1])
    done = 0
    images = (x for x, _ in data.batches(scale))
    batches = parallel_map(compiled(split.trunk), images)
    for part, mean in track(batches, "features", data.batch_count):
        features[done : done + len(part)] = part
        activation += np.sum(mean, axis=0, dtype=np.float64)
        done += len(part)
    if not np.isfinite(activation).all():
        raise InputError(f"{data.path}: the model's feature maps are not finite for some images")
    return features, activation / len(data)
