"""How long a scan takes, told from its first part: training the first twin on changed images.

The unit is the pass of one image forward through the net. The gradient of the image counts as
another pass, that of the weights as one more. What runs only the head of the net, and changing
images, count as nothing.
"""

from __future__ import annotations

import numpy as np

from defence.beyond import scan, sought, twins
from defence.net.cached_net import CachedNet


def compare_scan(net: CachedNet) -> float:
    """Return how often a scan takes the time of its first part. net: B on a clean dataset."""
    right, classes = int(np.sum(net.classes == net.labels)), net.split.net.output_shape[1]
    stages = twins.CHANGED, twins.PLAIN
    parts = [3 * twins.count_rows(len(net.labels), steps) for steps, _ in stages]
    return count_passes(right, classes, sum(parts)) / parts[0]


def count_passes(right: int, classes: int, twin: int) -> int:
    """Return how many images run through a net in a scan.

    right: images that B answers with their label.  classes: N.
    twin: passes of the training of a twin.
    """
    models = 1 + twins.COUNT
    count, repeats = scan.count_images(right, classes)
    changes = repeats * count * len(scan.CHANGES) * models
    patches = scan.PATCHES * scan.count_patch_passes(min(scan.PATCHED_IMAGES, count), models)
    searches = sought.count_searches(classes, models)
    return twins.COUNT * twin + changes + patches + 2 * sought.STEPS * sought.STEP_IMAGES * searches
