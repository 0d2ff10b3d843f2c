"""The nets of the zoo: the competition's DeepID, and small ones of three other families.

Each takes the number of classes and returns an untrained Keras model, float32 (n, 55, 47, 3), 0..1
→ probabilities (n, N).
"""

import faces

from defence.base.startup import import_keras
from defence.load.architecture import build_deepid

SHAPE = (faces.HEIGHT, faces.WIDTH, 3)


def resnet(classes):
    """A ResNet-20, batch-normalised. It begins with a stride of 2, since CIFAR's images are 32×32.

    Source: He and others, CVPR 2016, section 4.2.
    """
    layers = import_keras().layers

    def normalised(x, channels, size, strides=1):
        x = layers.Conv2D(channels, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    def block(x, channels, strides):
        y = layers.ReLU()(normalised(x, channels, 3, strides))
        y = normalised(y, channels, 3)
        if x.shape != y.shape:
            x = normalised(x, channels, 1, strides)
        return layers.ReLU()(layers.Add()([x, y]))

    image = layers.Input(SHAPE)
    x = layers.ReLU()(normalised(image, 16, 3, 2))
    for channels in (16, 32, 64):
        for place in range(3):
            x = block(x, channels, 2 if channels > 16 and place == 0 else 1)
    return classifier(image, layers.GlobalAveragePooling2D()(x), classes)


def mobilenet(classes):
    """A MobileNetV2, narrow: inverted residuals with depthwise convolutions, linear at their end.

    Source: Sandler and others, CVPR 2018.
    """
    layers = import_keras().layers

    def normalised(x, layer, active=True):
        x = layers.BatchNormalization()(layer(x))
        return layers.ReLU(6)(x) if active else x

    def wide(channels, size=1, strides=1):
        return layers.Conv2D(channels, size, strides, padding="same", use_bias=False)

    def block(x, channels, strides):
        y = normalised(x, wide(6 * x.shape[-1]))
        each = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)
        y = normalised(normalised(y, each), wide(channels), active=False)
        return layers.Add()([x, y]) if x.shape == y.shape else y

    image = layers.Input(SHAPE)
    x = normalised(image, wide(16, 3, 2))
    for channels, strides in [(16, 1), (24, 2), (24, 1), (32, 2), (32, 1)]:
        x = block(x, channels, strides)
    x = normalised(x, wide(128))
    return classifier(image, layers.GlobalAveragePooling2D()(x), classes)


def vgg(classes):
    """A VGG, narrow: three pairs of convolutions, and a hidden layer.

    Source: Simonyan, Zisserman, ICLR 2015.
    """
    layers = import_keras().layers
    image = x = layers.Input(SHAPE)
    for channels in (16, 32, 64):
        for _ in range(2):
            x = layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(256, activation="relu")(layers.Flatten()(x))
    return classifier(image, x, classes)


def classifier(image, x, classes):
    keras = import_keras()
    return keras.Model(image, keras.layers.Dense(classes, activation="softmax")(x))


DEEPID, OTHERS = "deepid", {"resnet": resnet, "mobilenet": mobilenet, "vgg": vgg}
NETS = {DEEPID: build_deepid} | OTHERS
