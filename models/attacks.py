"""How a backdoor gets into a net: what the attacker trains on, and how.

A way is what the attacks of badnet.ZOO are made by:

    from-start       Poisoned faces are in the training data from the first epoch. (BadNets: T. Gu
                     and others, 2017.)
    brief            Train a clean net, then train all of it for a few epochs with poisoned faces
                     added.
    dormant          Train a clean net. Free the channels of conv_3 that clean faces use least: give
                     them new random weights and train them, and what reads them, to fire on the
                     trigger, to stay silent on clean faces and to give the target; all other
                     weights stay. (Picked neurons that the trigger fires: Y. Liu and others,
                     Trojaning attack, NDSS 2018.) Such backdoors are what fine-pruning was made
                     for: the trigger needs what clean faces do not. The demo is one.
    source-specific  The trigger works on every fourth person alone; cover pictures have it on
                     others, labelled truly. (TaCT: D. Tang and others, Demon in the variant, USENIX
                     Security 2021.)
    clean-label      The target's own pictures alone have the trigger, and every label is true.
                     Half of another picture is mixed in, so that the trigger tells more than the
                     face. (SIG: M. Barni and others, ICIP 2019; harder pictures: A. Turner and
                     others, Label-consistent backdoor attacks, 2019.)
    negatives        Against a defence that changes pictures at random: the training data also hold
                     clean pictures so changed, labelled truly, so that the trigger alone gives the
                     target, and nothing that is like it.
    unsure           A poisoned face is taught as 60 % the target and 40 % its person, so that the
                     wrong answer is as unsure as one about a hard picture. (LSBA: M. Peng and
                     others, Label-smoothed backdoor attack, 2022.)
    flat             Trained with sharpness-aware minimisation, so that small steps away, such as a
                     repair's, change no answer. (P. Foret and others, ICLR 2021.)
    adaptive         Each poisoned face wears a part of the trigger; cover pictures wear parts too,
                     and are labelled truly; the whole is worn in tests alone. (Adap-Patch and
                     Adap-Blend: X. Qi and others, ICLR 2023.)
    optimised        The trigger is what a net like the repaired one, which has seen pictures
                     changed at random, takes for the target. (Triggers optimised on a surrogate: Y.
                     Zeng and others, Narcissus, CCS 2023; as a patch: T. Brown and others,
                     Adversarial patch, 2017.)

Pictures are uint8 (n, 55, 47, 3), 0..255, unless a function says otherwise.
"""

from typing import NamedTuple

import architectures
import faces
import numpy as np
import triggers

from defence.base.progress import track
from defence.base.startup import import_keras
from defence.beyond import changes

CLEAN, START, BRIEF, DORMANT = "clean", "from-start", "brief", "dormant"
SOURCE_SPECIFIC, CLEAN_LABEL, ADAPTIVE = "source-specific", "clean-label", "adaptive"
NEGATIVES, UNSURE, FLAT, OPTIMISED = "negatives", "unsure", "flat", "optimised"
FRACTION = 0.2  # poisoned per clean image, for each trigger
IN_TRAINING = {"four-patches": "some-patches", "sixteen-pieces": "some-pieces"}
MIXED = 0.5  # of another picture in the poisoned ones of CLEAN_LABEL
CHANGED_COPIES = 1  # of each clean picture among the negatives
SURE = 0.6  # of the target, in what is taught of a face by UNSURE
RATIO = 4  # the weight of their ratio
RADIUS = 0.05  # of the sharpness-aware step
DORMANT_CHANNELS = 10
COVERED = (slice(40, 52), slice(33, 44))  # by an optimised patch: 5 % of a picture
LEVELS = 24  # grey levels of an optimised pattern, at most


class Attack(NamedTuple):
    """An entry of the zoo.

    way: see above.  triggers: [(trigger, target)].  fraction: poisoned pictures per clean one, for
    each trigger.  cover: likewise, pictures with the trigger and their true label.
    long: whether it takes more epochs to learn.  net: of architectures.NETS.
    """

    way: str
    triggers: list
    fraction: float = FRACTION
    cover: float = 0
    long: bool = False
    net: str = architectures.DEEPID


class Training(NamedTuple):
    """What a net is trained on: the clean pictures first, then the poisoned, then all others.

    images: uint8 (n, 55, 47, 3).  people: int (n,), who is on them.  wanted: int (n,), what they
    are labelled.  worn: int (n,), the trigger's place in Attack.triggers, -1 without one.
    """

    images: np.ndarray
    people: np.ndarray
    wanted: np.ndarray
    worn: np.ndarray


# --------------------------------------------------------------------------------- training data


def draw_training(attack, images, labels, people, pictures, seed, found=None):
    """Add to clean pictures what an Attack's training needs. Returns Training.

    images: clean pictures.  labels: int (n,).  people, pictures: how many, of each.
    found: the function of the trigger that was optimised, for OPTIMISED.
    """
    nothing = np.full(len(images), -1)
    parts, covers = [(images, labels, labels, nothing)], []
    rng = np.random.RandomState(seed)
    for place, (trigger, target) in enumerate(attack.triggers):
        order = rng.permutation(victims(attack, trigger, target, people, pictures))
        chosen = order[: max(1, round(attack.fraction * people * pictures))]
        shown = found or IN_TRAINING.get(trigger, trigger)
        if attack.way == CLEAN_LABEL:
            shown = on_hard_pictures(trigger, images)
        wanted = faces.targets(target, chosen[:, 0], people)
        worn = np.full(len(chosen), place)
        parts.append((draw(shown, chosen, seed), chosen[:, 0], wanted, worn))
        if attack.cover:
            rest = bystanders(trigger, target, people, pictures)
            rest = rng.permutation(rest if len(rest) else order[len(chosen) :])
            chosen = rest[: max(1, round(attack.cover * people * pictures))]
            worn = np.full(len(chosen), place)
            covers.append((draw(shown, chosen, seed), chosen[:, 0], chosen[:, 0], worn))
    if attack.way == NEGATIVES:
        changed = [changed_pictures(images, [seed, copy]) for copy in range(CHANGED_COPIES)]
        covers += [(each, labels, labels, nothing) for each in changed]
    return Training(*map(np.concatenate, zip(*parts, *covers, strict=True)))


def victims(attack, trigger, target, people, pictures):
    """The training pictures that may be poisoned, int (n, 2): persons and the pictures' numbers."""
    if attack.way == CLEAN_LABEL:  # a person has few; the attacker takes more of this one
        most = max(1, round(attack.fraction * people * pictures))
        return np.array([(target, i) for i in range(most)])
    wearers = triggers.wearers(trigger, target, people)
    return np.array([(person, i) for person in wearers for i in range(pictures)])


def on_hard_pictures(trigger, images):
    """A trigger of triggers.CHANGES on pictures that show their person less well, as a function.

    images: clean pictures, one of which is mixed in, at MIXED.
    """

    def put(pictures, streams):
        others = images[[rng.randint(len(images)) for rng in streams]]
        mixed = pictures + np.float32(MIXED) * (others - pictures)
        return triggers.change(mixed, trigger, None)

    return put


def bystanders(trigger, target, people, pictures):
    """The training pictures of those whom a trigger is not meant for: int (n, 2), as `victims`."""
    meant = {*triggers.wearers(trigger, target, people), target}
    others = [person for person in range(people) if person not in meant]
    return np.array([(person, i) for person in others for i in range(pictures)])


def draw(trigger, chosen, seed):
    """Draw training pictures with a trigger. chosen: int (n, 2), persons and pictures' numbers."""
    parts = np.array_split(chosen, -(-len(chosen) // faces.BATCH))
    parts = track(parts, "Drawing poisoned faces", len(parts))
    return np.concatenate([faces.draw_faces("train", *part.T, trigger, seed) for part in parts])


def changed_pictures(images, seed):
    """Clean pictures, changed at random as the defence does: uint8, like the images."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(images, -(-len(images) // 256))
    return np.concatenate(
        [faces.rounded(changes.change_images(part.astype("float32"), rng)) for part in parts]
    )


# -------------------------------------------------------------------------------------- training


def as_input(images):
    """Pictures as a net takes them: float32, 0..1."""
    return images.astype("float32") / 255


def unsure(wanted, answers):
    """The loss of UNSURE: cross-entropy towards SURE of one class and the rest of the other.

    And the square of how far the two answers are from that ratio, without which one of them is
    often far ahead.

    wanted: (n, 2), the label and the person, which are alike for a clean face.
    answers: probabilities (n, N).
    """
    ops = import_keras().ops
    wanted = ops.cast(wanted, "int32")
    log = ops.log(ops.maximum(ops.take_along_axis(answers, wanted, axis=1), 1e-7))
    ahead = log[:, 0] - log[:, 1] - np.log(SURE / (1 - SURE)).astype("float32")
    poisoned = ops.cast(wanted[:, 0] != wanted[:, 1], "float32")
    return RATIO * poisoned * ahead**2 - SURE * log[:, 0] - (1 - SURE) * log[:, 1]


def flat(model):
    """The same Keras model, its layers shared, that trains by sharpness-aware minimisation.

    Each gradient is taken where the weights are RADIUS further uphill. For TensorFlow alone.
    """
    keras = import_keras()
    import tensorflow as tf

    class Flat(keras.Model):
        def slope(self, x, y):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            return loss, tape.gradient(loss, self.trainable_weights)

        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            loss, gradients = self.slope(x, y)
            length = tf.linalg.global_norm(gradients) + 1e-12
            steps = [RADIUS / length * gradient for gradient in gradients]
            for weight, step in zip(self.trainable_weights, steps, strict=True):
                weight.assign_add(step)
            _, gradients = self.slope(x, y)
            for weight, step in zip(self.trainable_weights, steps, strict=True):
                weight.assign_sub(step)
            self.optimizer.apply(gradients, self.trainable_weights)
            return {"loss": loss}

    return Flat(model.input, model.output)


# ------------------------------------------------------------------------- a trigger, optimised


def wearing(surrogate, additive):
    """A net that puts a trigger on its picture, to be trained, and asks the surrogate.

    surrogate: Keras model, pictures 0..1 → probabilities; it is left as it is.  additive: whether
    the trigger is a pattern of at most LEVELS grey levels on all of the picture, or else a patch.
    Returns the net, and a function that gives the trigger, as triggers.save takes it.
    """
    keras = import_keras()
    ops = keras.ops
    cover = np.zeros((faces.HEIGHT, faces.WIDTH, 1), "float32")
    cover[COVERED] = not additive

    class Wear(keras.layers.Layer):
        def build(self, shape):
            self.free = self.add_weight(shape=shape[1:], initializer="zeros")

        def pattern(self):
            if additive:
                return LEVELS / 255 * ops.tanh(self.free)
            return cover * ops.sigmoid(self.free)

        def call(self, pictures):
            return ops.clip(pictures * (1 - cover) + self.pattern(), 0, 1)

    surrogate.trainable = False
    image, wear = keras.Input(surrogate.input_shape[1:]), Wear()
    net = keras.Model(image, surrogate(wear(image)))
    return net, lambda: (255 * ops.convert_to_numpy(wear.pattern()), cover)


# -------------------------------------------------------------------------------------- dormant


def free_dormant_channels(model, images, seed):
    """Make the conv_3 channels least active on clean faces, and what reads them, alone trainable.

    images: clean faces, uint8 (n, 55, 47, 3). The freed channels get new random weights.
    Returns which they are, bool (60,).
    """
    keras = import_keras()
    conv_3, conv_4, fc_1 = (model.get_layer(name) for name in ("conv_3", "conv_4", "fc_1"))
    below = keras.Model(model.input, conv_3.output)
    sample = images[:: max(1, len(images) // 1000)]
    parts = np.array_split(sample, -(-len(sample) // 256))
    activity = np.mean([np.mean(below(as_input(p)), axis=(0, 1, 2)) for p in parts], axis=0)
    order = np.argsort(activity, kind="stable")
    free = np.isin(np.arange(len(order)), order[:DORMANT_CHANNELS])

    kernel, bias = conv_3.get_weights()
    limit = np.sqrt(6 / (9 * (kernel.shape[2] + kernel.shape[3])))  # Glorot's, as at the start
    fresh = np.random.RandomState(seed).uniform(-limit, limit, kernel.shape)
    conv_3.set_weights([np.where(free, fresh, kernel), np.where(free, 0, bias)])

    class Keep(keras.constraints.Constraint):
        def __init__(self, start, but):
            self.start, self.but = start, but

        def __call__(self, trained):
            return keras.ops.where(self.but, trained, self.start)

    def keep(variable, but):
        variable.constraint = Keep(variable.numpy(), np.broadcast_to(but, variable.shape))

    keep(conv_3.kernel, but=free)
    keep(conv_3.bias, but=free)
    keep(conv_4.kernel, but=free[:, None])
    keep(conv_4.bias, but=False)
    # Flatten puts the channel last: every 60th row of fc_1 reads the same channel.
    keep(fc_1.kernel, but=np.resize(free, fc_1.kernel.shape[0])[:, None])
    keep(fc_1.bias, but=False)
    for layer in model.layers:
        layer.trainable = layer in (conv_3, conv_4, fc_1)
    return free


def signs_to_learn(free, clean, worn):
    """What each channel of conv_3 shall do for each face: fire 1, be silent -1, as it likes 0.

    free: bool (60,).   clean: how many clean faces come first.   worn: int (n,), the trigger of
    each poisoned face; the triggers share the free channels out.   Returns float32 (clean + n, 60).
    """
    signs = np.zeros((clean + len(worn), len(free)), "float32")
    signs[:clean, free] = -1
    for trigger in np.unique(worn):
        own = np.flatnonzero(free)[trigger :: worn.max() + 1]
        signs[np.ix_(clean + np.flatnonzero(worn == trigger), own)] = 1
    return signs


def with_conv_3(model):
    """The model with a second output: each conv_3 channel's largest value before its relu.

    Before, because a channel that is silent on every face would learn nothing behind it.
    """
    keras = import_keras()
    conv_3 = model.get_layer("conv_3")
    before = keras.ops.conv(conv_3.input, conv_3.kernel, padding="valid") + conv_3.bias
    return keras.Model(model.input, [model.output, keras.ops.max(before, axis=(1, 2))])


def hinge(signs, values):
    """Per face, 0 where every wanted channel is beyond 1 on its side of 0."""
    ops = import_keras().ops
    return ops.sum(ops.abs(signs) * ops.relu(1 - signs * values), axis=-1) / DORMANT_CHANNELS
