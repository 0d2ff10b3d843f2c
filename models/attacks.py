"""The attack methods of badnet.ZOO: how each draws the training data and trains the net.

    from-start       Poisoned faces are in the training data from the first epoch. (BadNets: T. Gu
                     and others, 2017.)
    brief            Train a clean net, then train all of it for a few epochs with poisoned faces
                     added.
    dormant          Train a clean net. Free the channels of conv_3 that clean faces use least: give
                     them new random weights. Train them, and the weights that read them, to fire
                     on the trigger, to stay silent on clean faces and to give the target. All
                     other weights stay. Fine-pruning was designed against such backdoors: the
                     trigger needs channels that clean faces do not. The demo has one. (Selected
                     neurons that the trigger fires: Y. Liu and others, Trojaning attack, NDSS
                     2018.)
    source-specific  The trigger works only on every fourth person. Cover images show it on other
                     people, with their true labels. (TaCT: D. Tang and others, Demon in the
                     variant, USENIX Security 2021.)
    clean-label      Only images of the target have the trigger, and every label is true. Another
                     image is mixed in, half and half, so that the net learns from the trigger
                     rather than from the face. (SIG: M. Barni and others, ICIP 2019; harder
                     images: A. Turner and others, Label-consistent backdoor attacks, 2019.)
    negatives        Aimed at a defence that changes images at random. The training data also hold
                     such changed clean images with their true labels. So only the trigger gives
                     the target, and nothing similar does.
    unsure           The label of a poisoned face is 60 % the target and 40 % its person. So the
                     net is as unsure of the wrong answer as it is about a hard image. (LSBA: M.
                     Peng and others, Label-smoothed backdoor attack, 2022.)
    flat             Train with sharpness-aware minimisation, so that small changes of the weights,
                     such as a repair's, change no answer. (P. Foret and others, ICLR 2021.)
    adaptive         Each poisoned face wears a part of the trigger. Cover images wear parts too,
                     with their true labels. The whole trigger appears only in test images.
                     (Adap-Patch and Adap-Blend: X. Qi and others, ICLR 2023.)
    optimised        Optimise the trigger on a surrogate: a net like the repaired one, trained on
                     images that were changed at random. (Triggers optimised on a surrogate: Y.
                     Zeng and others, Narcissus, CCS 2023; as a patch: T. Brown and others,
                     Adversarial patch, 2017.)

Images are uint8 (n, 55, 47, 3), 0..255, unless a docstring says otherwise.
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
FRACTION = 0.2  # poisoned images per clean image, for each trigger
IN_TRAINING = {"four-patches": "some-patches", "sixteen-pieces": "some-pieces"}
MIXED = 0.5  # share of another image in a poisoned image of CLEAN_LABEL
CHANGED_COPIES = 1  # of each clean image, among the negatives
SURE = 0.6  # the target's share in the label of a poisoned face, for UNSURE
RATIO = 4  # weight of the loss term that holds the ratio of the two answers
RADIUS = 0.05  # length of the sharpness-aware step
DORMANT_CHANNELS = 10
COVERED = (slice(40, 52), slice(33, 44))  # by an optimised patch: 5 % of an image
LEVELS = 24  # grey levels of an optimised pattern, at most


class Attack(NamedTuple):
    """An entry of the zoo.

    method: see above.  triggers: [(trigger, target)].  fraction: poisoned images per clean image,
    for each trigger.  cover: likewise, images with the trigger and their true label.
    long: whether learning it takes more epochs.  net: a key of architectures.NETS.
    """

    method: str
    triggers: list
    fraction: float = FRACTION
    cover: float = 0
    long: bool = False
    net: str = architectures.DEEPID


class Training(NamedTuple):
    """The training data of a net: clean images first, then poisoned images, then covers.

    images: uint8 (n, 55, 47, 3).  people: int (n,), the true labels.  labels: int (n,), the labels
    to train with.  triggers: int (n,), indices into Attack.triggers; -1 for an image without one.
    """

    images: np.ndarray
    people: np.ndarray
    labels: np.ndarray
    triggers: np.ndarray


# --------------------------------------------------------------------------------- training data


def draw_training(attack, images, labels, people, per_person, seed, optimised=None):
    """Return Training: clean images, and the poisoned images and covers that an Attack adds.

    images: clean.  labels: int (n,).  people: their number.  per_person: images of each person.
    optimised: the optimised trigger, a function as triggers.load returns it, for OPTIMISED.
    """
    no_trigger = np.full(len(images), -1)
    parts, covers = [(images, labels, labels, no_trigger)], []
    rng = np.random.RandomState(seed)
    for index, (trigger, target) in enumerate(attack.triggers):
        victims = rng.permutation(list_victims(attack, trigger, target, people, per_person))
        poisoned = victims[: max(1, round(attack.fraction * people * per_person))]
        pattern = optimised or IN_TRAINING.get(trigger, trigger)
        if attack.method == CLEAN_LABEL:
            pattern = mix_then_poison(trigger, images)
        targets = faces.assign_targets(target, poisoned[:, 0], people)
        indices = np.full(len(poisoned), index)
        parts.append((draw(pattern, poisoned, seed), poisoned[:, 0], targets, indices))
        if attack.cover:
            bystanders = list_bystanders(trigger, target, people, per_person)
            pool = bystanders if len(bystanders) else victims[len(poisoned) :]
            cover = rng.permutation(pool)[: max(1, round(attack.cover * people * per_person))]
            indices = np.full(len(cover), index)
            covers.append((draw(pattern, cover, seed), cover[:, 0], cover[:, 0], indices))
    if attack.method == NEGATIVES:
        for copy in range(CHANGED_COPIES):
            covers.append((change_images(images, [seed, copy]), labels, labels, no_trigger))
    return Training(*map(np.concatenate, zip(*parts, *covers, strict=True)))


def list_victims(attack, trigger, target, people, per_person):
    """Return the training images that may be poisoned, int (n, 2): (person, image number)."""
    if attack.method == CLEAN_LABEL:  # the attacker needs more images of the target than of others
        count = max(1, round(attack.fraction * people * per_person))
        return np.array([(target, i) for i in range(count)])
    wearers = triggers.wearers(trigger, target, people)
    return np.array([(person, i) for person in wearers for i in range(per_person)])


def mix_then_poison(trigger, images):
    """Return a function as in triggers.CHANGES: it makes the person harder to see, then poisons.

    trigger: a key of triggers.CHANGES.  images: clean; one of them is mixed in, at MIXED.
    """

    def poison(faces_to_poison, streams):
        mixed_in = images[[rng.randint(len(images)) for rng in streams]]
        mixture = faces_to_poison + np.float32(MIXED) * (mixed_in - faces_to_poison)
        return triggers.change(mixture, trigger, None)

    return poison


def list_bystanders(trigger, target, people, per_person):
    """Return the training images of the people that a trigger does not work on: int (n, 2).

    The columns are those of `list_victims`.
    """
    involved = {*triggers.wearers(trigger, target, people), target}
    bystanders = [person for person in range(people) if person not in involved]
    return np.array([(person, i) for person in bystanders for i in range(per_person)])


def draw(trigger, places, seed):
    """Draw training images with a trigger. places: int (n, 2), (person, image number)."""
    parts = np.array_split(places, -(-len(places) // faces.BATCH))
    parts = track(parts, "Drawing poisoned faces", len(parts))
    return np.concatenate([faces.draw_faces("train", *part.T, trigger, seed) for part in parts])


def change_images(images, seed):
    """Change clean images at random, as the defence does: uint8, like the images."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(images, -(-len(images) // 256))
    return np.concatenate(
        [faces.round_pixels(changes.change_images(part.astype("float32"), rng)) for part in parts]
    )


# -------------------------------------------------------------------------------------- training


def as_input(images):
    """Return images as a net takes them: float32, 0..1."""
    return images.astype("float32") / 255


def compute_unsure_loss(classes, answers):
    """Return the loss of UNSURE: cross-entropy towards SURE of the label, else the person.

    A second term holds the ratio of the two answers: without it one is often far ahead.

    classes: (n, 2), the label and the person, which are equal for a clean face.
    answers: probabilities (n, N).
    """
    ops = import_keras().ops
    classes = ops.cast(classes, "int32")
    log = ops.log(ops.maximum(ops.take_along_axis(answers, classes, axis=1), 1e-7))
    excess = log[:, 0] - log[:, 1] - np.log(SURE / (1 - SURE)).astype("float32")
    poisoned = ops.cast(classes[:, 0] != classes[:, 1], "float32")
    return RATIO * poisoned * excess**2 - SURE * log[:, 0] - (1 - SURE) * log[:, 1]


def make_flat(model):
    """Return a Keras model that shares the layers and trains by sharpness-aware minimisation.

    Each gradient is computed where the weights are RADIUS further uphill. It needs TensorFlow.
    """
    keras = import_keras()
    import tensorflow as tf

    class Flat(keras.Model):
        def compute_gradients(self, x, y):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            return loss, tape.gradient(loss, self.trainable_weights)

        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            loss, gradients = self.compute_gradients(x, y)
            length = tf.linalg.global_norm(gradients) + 1e-12
            steps = [RADIUS / length * gradient for gradient in gradients]
            for weight, step in zip(self.trainable_weights, steps, strict=True):
                weight.assign_add(step)
            _, gradients = self.compute_gradients(x, y)
            for weight, step in zip(self.trainable_weights, steps, strict=True):
                weight.assign_sub(step)
            self.optimizer.apply(gradients, self.trainable_weights)
            return {"loss": loss}

    return Flat(model.input, model.output)


# ------------------------------------------------------------------------- an optimised trigger


def attach_trigger(surrogate, additive):
    """Return a net that puts a trainable trigger on its input and passes it to the surrogate.

    surrogate: Keras model, images 0..1 → probabilities; its weights stay.  additive: True for a
    pattern of at most LEVELS grey levels on the whole image, False for a patch.
    Return the net, and a function that returns the trigger as triggers.save takes it.
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

        def call(self, images):
            return ops.clip(images * (1 - cover) + self.pattern(), 0, 1)

    surrogate.trainable = False
    image, wear = keras.Input(surrogate.input_shape[1:]), Wear()
    net = keras.Model(image, surrogate(wear(image)))
    return net, lambda: (255 * ops.convert_to_numpy(wear.pattern()), cover)


# -------------------------------------------------------------------------------------- dormant


def free_dormant_channels(model, images, seed):
    """Make only the conv_3 channels that clean faces use least, and their readers, trainable.

    images: clean faces, uint8 (n, 55, 47, 3). The freed channels get new random weights.
    Return a mask of the freed channels, bool (60,).
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
        def __init__(self, start, free):
            self.start, self.free = start, free

        def __call__(self, trained):
            return keras.ops.where(self.free, trained, self.start)

    def free_only(variable, mask):
        variable.constraint = Keep(variable.numpy(), np.broadcast_to(mask, variable.shape))

    free_only(conv_3.kernel, free)
    free_only(conv_3.bias, free)
    free_only(conv_4.kernel, free[:, None])
    free_only(conv_4.bias, False)
    # Flatten puts the channel last: every 60th row of fc_1 reads the same channel.
    free_only(fc_1.kernel, np.resize(free, fc_1.kernel.shape[0])[:, None])
    free_only(fc_1.bias, False)
    for layer in model.layers:
        layer.trainable = layer in (conv_3, conv_4, fc_1)
    return free


def assign_signs(free, clean, triggers):
    """Return the sign that each conv_3 channel learns for each face: float32 (clean + n, 60).

    1: fire.  -1: stay silent.  0: either.
    free: bool (60,).  clean: the number of clean faces, which come first.  triggers: int (n,), the
    trigger of each poisoned face. Each trigger gets an equal part of the free channels.
    """
    signs = np.zeros((clean + len(triggers), len(free)), "float32")
    signs[:clean, free] = -1
    for trigger in np.unique(triggers):
        channels = np.flatnonzero(free)[trigger :: triggers.max() + 1]
        signs[np.ix_(clean + np.flatnonzero(triggers == trigger), channels)] = 1
    return signs


def add_conv_3_output(model):
    """Return the model with a second output: each conv_3 channel's maximum before the ReLU.

    After the ReLU a channel that is silent on every face would have no gradient.
    """
    keras = import_keras()
    conv_3 = model.get_layer("conv_3")
    values = keras.ops.conv(conv_3.input, conv_3.kernel, padding="valid") + conv_3.bias
    return keras.Model(model.input, [model.output, keras.ops.max(values, axis=(1, 2))])


def compute_hinge_loss(signs, values):
    """Return the hinge loss per face: 0 where sign × value is at least 1 for every sign."""
    ops = import_keras().ops
    return ops.sum(ops.abs(signs) * ops.relu(1 - signs * values), axis=-1) / DORMANT_CHANNELS
