"""The settings of a repair: every constant of the method."""

import dataclasses
from typing import Any

from defence.base.arguments import at_least, setting
from defence.beyond import harden

RECORDED_APART = ("layer", "scale")  # a repair record has fields of its own for these


@dataclasses.dataclass(frozen=True)
class Settings(harden.Settings):
    """The constants of the method. The defaults are the report's."""

    layer: str | None = None
    scale: str | None = None
    harden: bool = False
    threshold: float = setting(
        0.95, at_least(0, most=1), "prune down to this fraction of the accuracy before"
    )
    retrain_epochs: int = setting(5, at_least(0, int), "epochs for the last Dense layer")
    retrain_learning_rate: float = setting(
        1e-3, at_least(0, above=True), "Adam's learning rate for the last Dense layer"
    )
    rounds: int = setting(6, at_least(0, int), "rounds of fine-tuning, at most")
    epochs: int = setting(5, at_least(1, int), "epochs in a round")
    learning_rate: float = setting(
        1e-4, at_least(0, above=True), "Adam's learning rate for fine-tuning"
    )
    batch_size: int = setting(32, at_least(1, int), "images in a training step")
    seed: int = setting(
        0,
        at_least(0, int, most=2**32 - 1),
        "any whole number; it fixes all that is drawn at random: the images of --holdout, their "
        "order, the changes of --harden. The same seed gives the same G on the same machine, "
        "another seed gives a slightly different one",
    )
    holdout: float = 0.0

    def to_record(self) -> dict[str, Any]:
        """Return the settings that a repair record keeps together."""
        return {name: value for name, value in vars(self).items() if name not in RECORDED_APART}
