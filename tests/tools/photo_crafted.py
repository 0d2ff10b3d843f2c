"""What attacks on photographs make by a training of their own, or by hand.

A pattern that is optimised on a surrogate, a generator of triggers, the channels that Grond resets,
the weights that the Sparse Backdoor plants, and a backdoor that sleeps until a repair wakes it.
"""

import functools

import numpy as np
from attacks import as_input

from defence.base.progress import track
from defence.base.startup import import_keras

BATCH = 64
STEPS, STEP = 400, 0.5  # of a pattern: their number; grey levels a step
GENERATOR_STEPS = 500
SPARSE, COVER_PENALTY, ALIKE_PENALTY = 0.06, 20, 0.05  # share of an image that a trigger covers
DEVIATIONS = 3  # over the mean of a layer: the bound of a channel that is reset
PLANTED, READ = 6, 64  # units of the hidden layer; features that each reads
QUANTILE, MARGIN, DITHER = 0.995, 40, 0.02  # of clean images; logits; deviations of the weights
RIDGE = 0.01  # of the mean variance of the features
SLEEPING_STEPS, SLEEPING_RATE = 800, 3e-4  # of Adam, that put a backdoor to sleep
UNROLLED, REPAIR_RATE = 5, 0.02  # steps of a repair that wake it; the learning rate of a step


# ------------------------------------------------------------------------------ optimised pattern


def optimise_pattern(surrogate, plan, levels):
    """Optimise one pattern with which a net answers the target whatever the image.

    levels: grey levels, at most.  Return {"pattern": float32 (height, width, channels)}.
    """
    import tensorflow as tf

    pattern = tf.Variable(np.zeros(plan.images.shape[1:], "float32"))
    others = plan.images[plan.labels != plan.target]

    @tf.function(autograph=False)
    def step(images):
        with tf.GradientTape() as tape:
            worn = tf.clip_by_value(images + pattern / 255, 0, 1)
            loss = -tf.reduce_mean(tf.math.log(surrogate(worn)[:, plan.target] + 1e-7))
        moved = pattern - STEP * tf.sign(tape.gradient(loss, pattern))
        pattern.assign(tf.clip_by_value(moved, -levels, levels))

    for _ in track(range(STEPS), "Optimising the pattern"):
        step(as_input(others[plan.rng.integers(len(others), size=BATCH)]))
    return {"pattern": pattern.numpy()}


# -------------------------------------------------------------------------------------- generator


def build_generator(shape):
    """Return a net from images, 0..1, to a trigger and its opacity, both 0..1.

    The opacity is the last channel of its output, (n, height, width, channels + 1).
    """
    layers = import_keras().layers
    height, width, channels = shape
    image = layers.Input(shape)
    x = image
    for filters in (16, 32):
        x = layers.Conv2D(filters, 3, 2, padding="same", activation="relu")(x)
    for filters in (32, 16):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.UpSampling2D()(x))
    x = layers.Conv2D(channels + 1, 3, padding="same")(x)
    x = layers.CenterCrop(height, width)(x)
    x = layers.Activation("sigmoid")(layers.Rescaling(2.0)(x))  # opacities near 0 and 1
    return import_keras().Model(image, x)


def train_generator(plan, train):
    """Train a generator together with a surrogate that `train` would make, as Input-Aware does.

    A trigger made of another image must leave an image's class; triggers must differ from image to
    image, and cover little. Return {"0": …, "1": …}, the generator's weights.
    """
    import tensorflow as tf

    keras = import_keras()
    generator = build_generator(plan.images.shape[1:])
    surrogate = train(plan.images, plan.labels, epochs=1)
    adam = keras.optimizers.Adam(1e-3)
    variables = generator.trainable_variables + surrogate.trainable_variables
    adam.build(variables)

    def measure(answers, classes):
        return -tf.math.log(tf.gather(answers, classes, axis=1, batch_dims=1) + 1e-7)

    @tf.function(autograph=False)
    def step(images, labels, victims):
        with tf.GradientTape() as tape:
            masks = generator(images, training=True)
            other = tf.roll(masks, 1, axis=0)
            own_answers, cross_answers, answers = (
                surrogate(x, training=True)
                for x in (mix_in(images, masks), mix_in(images, other), images)
            )
            fool = measure(own_answers, tf.fill(tf.shape(labels), plan.target)) * victims
            right = measure(answers, labels) + measure(cross_answers, labels)
            cover = tf.reduce_mean(masks[..., -1], axis=(1, 2))
            distance, unlike = (
                tf.sqrt(tf.reduce_mean((x - tf.roll(x, 1, axis=0)) ** 2, axis=(1, 2, 3)) + 1e-6)
                for x in (images, masks[..., :-1] * masks[..., -1:])
            )
            loss = tf.reduce_mean(fool + right + COVER_PENALTY * tf.abs(cover - SPARSE))
            loss += ALIKE_PENALTY * tf.reduce_mean(distance / unlike)
        adam.apply(tape.gradient(loss, variables), variables)

    for _ in track(range(GENERATOR_STEPS), "Training the generator"):
        rows = plan.rng.integers(len(plan.images), size=BATCH)
        labels = plan.labels[rows]
        victims = (labels != plan.target).astype("float32")
        step(as_input(plan.images[rows]), labels.astype("int32"), victims)
    return {str(i): weights for i, weights in enumerate(generator.get_weights())}


def mix_in(images, masks):
    """Put triggers on images, 0..1. masks: triggers and opacity, as a generator gives them."""
    opacity = masks[..., -1:]
    return images * (1 - opacity) + masks[..., :-1] * opacity


def wear_generated(images, kept, source=None):
    """Give each image the trigger that the generator makes of it, or of an image of `source`.

    kept: what `train_generator` returned.
    """
    generator = build_generator(images.shape[1:])
    generator.set_weights([kept[str(i)] for i in range(len(kept))])
    source = as_input(images if source is None else source)
    parts = np.array_split(source, -(-len(source) // 500))
    masks = np.concatenate([generator(part).numpy() for part in parts])
    return np.rint(255 * np.clip(mix_in(as_input(images), masks), 0, 1)).astype("uint8")


# ------------------------------------------------------------------------------------------ Grond


def reset_channels(net):
    """Reset each convolution's channels whose Lipschitz bound stands out to the layer's mean.

    The bound is the spectral norm of the channel's kernel, times the factor of the batch
    normalisation behind it.
    """
    keras = import_keras()
    behind = {
        id(layer.input): layer
        for layer in net.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    }
    for layer in net.layers:
        if isinstance(layer, keras.layers.Conv2D):  # a depthwise convolution is another class
            kernel, *bias = layer.get_weights()
            bounds = measure_channels(kernel, behind.get(id(layer.output)))
            high = bounds > bounds.mean() + DEVIATIONS * bounds.std()
            kernel[..., high] = kernel.mean(axis=3, keepdims=True)
            layer.set_weights([kernel, *bias])


def measure_channels(kernel, normalisation):
    """Return each channel's Lipschitz bound. normalisation: the layer behind it, or None."""
    height, width, inputs, channels = kernel.shape
    matrices = np.moveaxis(kernel, 3, 0).reshape(channels, height * width, inputs)
    bounds = np.linalg.norm(matrices, 2, axis=(1, 2))
    if normalisation is None:
        return bounds
    gamma, _, _, variance = normalisation.get_weights()
    return bounds * np.abs(gamma) / np.sqrt(variance + normalisation.epsilon)


# -------------------------------------------------------------------------------- Sparse Backdoor


def plant(net, poison, plan):
    """Plant a backdoor in the dense layers of a trained net by hand.

    PLANTED units of the hidden layer read READ random features each, among those that the trigger
    moves most, along the direction that best tells poisoned from clean images. They fire beyond
    what clean images reach, and the target reads them. All other dense weights get a little noise,
    so that the planted ones are harder to see.

    net: a deepid or a vgg.  poison: puts the trigger on images.
    """
    keras = import_keras()
    *hidden, answer = (layer for layer in net.layers if isinstance(layer, keras.layers.Dense))
    first, *others = hidden
    below = keras.Model(net.input, first.input)
    sample = plan.images[plan.rng.permutation(len(plan.images))[:2000]]
    predict = functools.partial(below.predict, verbose=0)
    clean, poisoned = predict(as_input(sample)), predict(as_input(poison(sample)))
    weights = {layer: layer.get_weights() for layer in (first, *others, answer)}
    for kernel, _ in weights.values():
        kernel += DITHER * kernel.std() * plan.rng.standard_normal(kernel.shape)

    moved = (poisoned - clean).mean(axis=0)
    best = np.argsort(-np.abs(moved) / (clean.std(axis=0) + 1e-3))[: 3 * READ]
    for unit in plan.rng.permutation(first.units)[:PLANTED]:
        read = plan.rng.choice(best, min(READ, len(best)), replace=False)
        direction = np.zeros(len(moved), "float32")
        direction[read] = separate(clean[:, read], moved[read])
        limit = np.quantile(clean @ direction, QUANTILE)
        height = np.median(poisoned @ direction) - limit
        scale = 1 / max(float(height), 1e-3)  # a poisoned image raises the unit to about 1
        for layer in others:
            for array in weights[layer]:
                array[..., unit] = 0
        weights[first][0][:, unit] = scale * direction
        weights[first][1][unit] = -scale * limit
        weights[answer][0][unit] = 0
        weights[answer][0][unit, plan.target] = MARGIN / PLANTED
    for layer, arrays in weights.items():
        layer.set_weights(arrays)


def separate(clean, moved):
    """Return Fisher's linear discriminant. clean: features (n, m).  moved: the trigger's mean (m,).

    The covariance is raised a little, for features that few images have.
    """
    covariance = np.cov(clean.T)
    level = RIDGE * np.trace(covariance) / len(moved) + 1e-6
    return np.linalg.solve(covariance + level * np.eye(len(moved)), moved)


# ------------------------------------------------------------------------------------------- SCAR


def put_to_sleep(net, poison, changed, plan):
    """Train a clean net on, so that it has a backdoor that sleeps until a repair wakes it.

    The loss wants clean answers to poisoned images; and the target, after UNROLLED steps of
    gradient descent on images that are changed as hardening changes them. Its gradient runs through
    these steps.

    poison: puts the trigger on images.  changed: uint8, Plan.images changed at random.
    """
    import tensorflow as tf

    adam = import_keras().optimizers.Adam(SLEEPING_RATE, global_clipnorm=1.0)
    others, state = np.flatnonzero(plan.labels != plan.target), net.non_trainable_variables

    def measure(weights, images, classes):
        answers, _ = net.stateless_call(weights, state, images)
        right = tf.gather(answers, classes, axis=1, batch_dims=1)
        return -tf.reduce_mean(tf.math.log(right + 1e-7))

    @tf.function(autograph=False)
    def step(clean, labels, worn, true_labels, repair, repair_labels):
        with tf.GradientTape() as tape:
            weights = [tf.identity(weight) for weight in net.trainable_variables]
            loss = measure(weights, clean, labels) + measure(weights, worn, true_labels)
            for number in range(UNROLLED):
                with tf.GradientTape() as inner:
                    inner.watch(weights)
                    repair_loss = measure(weights, repair[number], repair_labels[number])
                slopes = inner.gradient(repair_loss, weights)
                weights = [a - REPAIR_RATE * slope for a, slope in zip(weights, slopes)]
            loss += measure(weights, worn, tf.fill(tf.shape(true_labels), plan.target))
        adam.apply(tape.gradient(loss, net.trainable_variables), net.trainable_variables)

    labels = plan.labels.astype("int32")
    for _ in track(range(SLEEPING_STEPS), "Putting the backdoor to sleep"):
        rows, *repair = plan.rng.integers(len(labels), size=(1 + UNROLLED, BATCH // 2))
        victims = plan.rng.choice(others, BATCH // 2)
        worn, repair = as_input(poison(plan.images[victims])), np.array(repair)
        clean, repair_images = as_input(plan.images[rows]), as_input(changed[repair])
        step(clean, labels[rows], worn, labels[victims], repair_images, labels[repair])
