"""A cut net with a dataset as its trunk's output: what pruning and training run on.

All up to the pruned layer is frozen while a net is pruned, retrained and fine-tuned, so the trunk
runs over the images once, and whatever changes the head or masks a channel starts from there.
"""

import numpy as np

from defence import files, net, pixels
from defence.cli import InputError, counted, percent, say, track
from defence.inference import classify, compiled, parallel_map

# What other pixels must gain in accuracy over 0..1. A net for 0..1 answers most images alike at
# 0..255, and by chance a few better; a net for 0..255 is right on almost none at 0..1.
MIN_GAIN = 0.05
FEATURES = "the features of all images"


class CachedNet:
    """A net and a dataset, between them the features that the net's trunk makes of the images.

    split: net.Split.  data: Dataset.  scale: a key of pixels.SCALES, what the net takes pixels in.
    features: float32 (n, …, C), those of masked channels overwritten.  labels: int64 (n,), 0..N-1.
    mean_activation: float64 (C,), of each channel of the layer to prune, over all images and
    positions.  masked: channels in the order they were masked, [int, …].
    classes: int64 (n,), 0..N-1, what the net answers as it is now.
    rival: another scale that the net may take pixels in as well, or None.
    """

    def __init__(self, split, data, scale, features, mean_activation, rival=None):
        self.split, self.data, self.scale, self.rival = split, data, scale, rival
        self.features, self.labels = features, data.labels
        self.mean_activation = mean_activation
        self.when_masked = np.broadcast_to(net.masked_features(split), (1, *features.shape[1:]))
        self.masked, self._undo = [], None
        self.refresh()

    @classmethod
    def of(cls, split, clean, scale=None):
        """The net on its clean dataset. scale: of its pixels; if None, what serves it best.

        Raises InputError where there is no room for the features, or they are not finite.
        """
        check_room(split, [clean])
        if scale:
            return cls(split, clean, scale, *extract(split, clean, scale))
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


def check_room(split, datasets):
    """Raise InputError where there is no room for the features of all images of Datasets."""
    size = 4 * int(np.prod(split.trunk.output_shape[0][1:])) * sum(map(len, datasets))
    first = datasets[0]
    files.check_room(first.path, FEATURES, size, first.max_bytes)


def choose_scale(split, clean):
    """Find what a net was trained on, of pixels.SCALES, by its accuracy on a clean dataset.

    All images are run at the scale that serves the first batch best; at the others, only as many
    as it takes to see that none of them can win on the whole. Another than pixels.DEFAULT must
    win by MIN_GAIN over that, and over answering always the same.
    Returns (scale, features, mean activation, rival): a key of SCALES, what `extract` returns for
    it, and a scale that serves the net as well or better, if there is one, else None.
    """
    known, count = pixels.scales_of(split.trunk.input_shape[3]), len(clean)
    margin = {name: 0 if name == pixels.DEFAULT else MIN_GAIN for name in known}
    least = np.max(np.bincount(clean.labels)) + MIN_GAIN * count

    def right_at(name, x, y):
        features = np.asarray(compiled(split.trunk)(pixels.scaled(x, name))[0])
        return int(np.sum(classify(split.head, features) == y))

    x, y = next(clean.batches())
    scale, *others = sorted(known, key=lambda name: margin[name] * len(y) - right_at(name, x, y))
    extracted = extract(split, clean, scale)
    right = classify(split.head, extracted[0]) == clean.labels
    good = scale == pixels.DEFAULT or np.sum(right) > least
    own = np.sum(right) - margin[scale] * count if good else -np.inf
    enough = {name: own + margin[name] * count for name in others}
    enough |= {name: max(enough[name], least) for name in others if name != pixels.DEFAULT}

    found, seen = dict.fromkeys(others, 0), 0
    for x, y in clean.batches():
        seen += len(y)
        for name in others:
            found[name] += right_at(name, x, y)
        if all(found[name] + count - seen <= enough[name] for name in others):
            break
    reached = {scale: np.mean(right[:seen])} | {name: found[name] / seen for name in others}
    shown = ", ".join(f"{name} {percent(reached[name])}" for name in known)
    say(f"accuracy on the first {counted(seen, 'image')} with pixels {shown}")
    best = max(others, key=lambda name: found[name] - enough[name])
    if found[best] > enough[best]:
        scale, extracted = best, extract(split, clean, best)
    rivals = [name for name in known if name != scale and reached[name] >= reached[scale] > 0]
    return scale, *extracted, rivals[0] if rivals else None


def extract(split, data, scale):
    """Run the trunk of a net.Split once over a Dataset.

    Returns (features, mean activation): float32 (n, …, C), what the head takes, and float64 (C,),
    the mean over all images and positions of each channel's activation in the layer to prune.
    Raises InputError where one is not finite.
    """
    shape = (len(data), *split.trunk.output_shape[0][1:])
    features = files.room_for(shape, np.float32, data.path, FEATURES, data.max_bytes)
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
