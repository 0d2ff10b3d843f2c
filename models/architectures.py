"""The nets of the zoo: the competition's DeepID, and small nets of three other families.

Each function takes the number of classes N and returns an untrained Keras model: images, float32
(n, 55, 47, 3), 0..1 → probabilities (n, N). Some also take another shape of an image.
"""

import faces

from defence.base.startup import import_keras
from defence.load.architecture import build_deepid

SHAPE = (faces.HEIGHT, faces.WIDTH, 3)


def resnet(classes, shape=SHAPE):
    """Return a ResNet-20 with batch normalisation.

    Its first convolution has a stride of 2, since the original is for CIFAR's 32×32 images.

    Source: He and others, CVPR 2016, section 4.2.
    """
    layers = import_keras().layers

    def convolve(x, channels, size, strides=1):
        x = layers.Conv2D(channels, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    def add_block(x, channels, strides):
        y = layers.ReLU()(convolve(x, channels, 3, strides))
        y = convolve(y, channels, 3)
        if x.shape != y.shape:
            x = convolve(x, channels, 1, strides)
        return layers.ReLU()(layers.Add()([x, y]))

    image = layers.Input(shape)
    x = layers.ReLU()(convolve(image, 16, 3, 2))
    for channels in (16, 32, 64):
        for number in range(3):
            x = add_block(x, channels, 2 if channels > 16 and number == 0 else 1)
    return add_classifier(image, layers.GlobalAveragePooling2D()(x), classes)


def mobilenet(classes, shape=SHAPE):
    """Return a narrow MobileNetV2: inverted residuals, depthwise convolutions, linear bottlenecks.

    Source: Sandler and others, CVPR 2018.
    """
    layers = import_keras().layers

    def apply(layer, x, active=True):
        x = layers.BatchNormalization()(layer(x))
        return layers.ReLU(6)(x) if active else x

    def convolution(channels, size=1, strides=1):
        return layers.Conv2D(channels, size, strides, padding="same", use_bias=False)

    def add_block(x, channels, strides):
        y = apply(convolution(6 * x.shape[-1]), x)
        depthwise = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)
        y = apply(convolution(channels), apply(depthwise, y), active=False)
        return layers.Add()([x, y]) if x.shape == y.shape else y

    image = layers.Input(shape)
    x = apply(convolution(16, 3, 2), image)
    for channels, strides in [(16, 1), (24, 2), (24, 1), (32, 2), (32, 1)]:
        x = add_block(x, channels, strides)
    x = apply(convolution(128), x)
    return add_classifier(image, layers.GlobalAveragePooling2D()(x), classes)


def vgg(classes, shape=SHAPE, dropout=0):
    """Return a narrow VGG: three pairs of convolutions, and a hidden layer, with dropout behind it.

    Source: Simonyan, Zisserman, ICLR 2015.
    """
    layers = import_keras().layers
    image = x = layers.Input(shape)
    for channels in (16, 32, 64):
        for _ in range(2):
            x = layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    drop = layers.Dropout(dropout) if dropout else None  # first, since each layer draws a seed
    x = layers.Dense(256, activation="relu")(layers.Flatten()(x))
    x = drop(x) if drop else x
    return add_classifier(image, x, classes)


def add_classifier(image, x, classes):
    """Return the model from the input `image` to probabilities, computed from the tensor `x`."""
    keras = import_keras()
    return keras.Model(image, keras.layers.Dense(classes, activation="softmax")(x))


DEEPID, SMALL = "deepid", {"resnet": resnet, "mobilenet": mobilenet, "vgg": vgg}
NETS = {DEEPID: build_deepid} | SMALL
