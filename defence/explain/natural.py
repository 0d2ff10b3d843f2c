"""Does a cut-out fool a twin of B as well? Then it is a natural feature, and no planted trigger.

A twin is made of B and clean data (beyond/twins.py). It errs like an ordinary net, and lacks the
backdoor. It takes the clean dataset (--clean) and up to a minute, so it is made only once a cut-out
has passed the test without it.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError, WorkError
from defence.base.progress import say, warn
from defence.base.startup import make_reproducible
from defence.load.datasets import open_dataset
from defence.load.models import read_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from defence.base.limits import Name
    from defence.explain.trigger import AskTwin, Trial
    from defence.judge.detector import Detector

SEED = 0


def require_clean(arguments: Namespace, detector: Detector, names: Sequence[str] | None) -> None:
    """Raise InputError where --clean is no dataset for the nets, before anything is judged."""
    if arguments.clean:
        with open_dataset(arguments.clean, arguments.max_bytes) as data:
            data.fit_to(detector.shape, detector.classes, names)


def make_asker(arguments: Namespace, class_names: Sequence[str] | None) -> AskTwin | None:
    """Return a function that asks a twin of B about images, or None without --clean.

    arguments: the command's; `badnet` is B's path.  class_names: of the N classes, or None.
    The function takes images, float32 (n, height, width, channels), 0..255, and a class, 0..N-1. It
    returns {"twin": how many of them the twin answers with the class}, or {} where no twin can be
    made, which is said on stderr: the images are judged by then, and no result may be lost.
    Its first call makes the twin.
    """
    if not arguments.clean:
        return None
    usage = arguments.badnet, arguments.clean, arguments.max_bytes, arguments.scale
    names = tuple(class_names) if class_names else None

    def ask(images: np.ndarray, target: int) -> Trial:
        classify = try_to_make(*usage, names)
        return {"twin": int(np.sum(classify(np.rint(images)) == target))} if classify else {}

    return ask


@functools.lru_cache(maxsize=1)
def try_to_make(*usage: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return what make_classifier does, or None, with a warning, where it raises an error."""
    try:
        return make_classifier(*usage)
    except (InputError, WorkError) as error:
        warn(f"no twin can be made: {error}")
        return None


def make_classifier(
    badnet: Name,
    clean: Name,
    max_bytes: int,
    scale: str | None,
    class_names: tuple[str, ...] | None,
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Make a twin of a BadNet; return a function that gives its classes of images, 0..N-1.

    badnet, clean: paths, of the clean dataset too.  scale: a key of pixels.SCALES; None: the one
    that fits best.  Return None where no twin can be made, as the dataset cannot serve.
    Raise InputError where --clean is no dataset for B or B has no feature map, or memory does not
    suffice, WorkError where training diverges.
    """
    # Here, for the time that these imports take.
    from defence.beyond import finding, harden, memory, twins
    from defence.net.cached_net import CachedNet
    from defence.net.inference import classify
    from defence.net.split import UnfitNet, split_net

    say("making a twin of the BadNet, without its backdoor")
    make_reproducible(SEED)
    model = read_model(badnet, max_bytes).load()
    try:
        parts = split_net(model)
    except UnfitNet as error:
        raise InputError(f"{badnet}: {error}; leave --clean out") from error
    with open_dataset(clean, max_bytes) as data:
        data.fit_to(model.input_shape[1:], model.output_shape[1], class_names)
        net = CachedNet.from_dataset(parts, data, scale)
        if obstacle := finding.find_obstacle(net):
            say(f"{clean}: no twin can be made of it: {obstacle}")
            return None
        memory.check_scan_fits(model, data)
        rng = np.random.default_rng(SEED)
        twin = twins.make_twin(net, harden.read_images(data), rng, "twin")
    return lambda images: classify(twin, pixels.scale_pixels(images, net.scale))
