"""What an untrusted file may contain, checked before the libraries that trust it see it."""

from terminal import InputError

# What a feed-forward image classifier is made of. A config may name anything importable, and
# Keras would look it up: whatever is not listed here is refused before Keras sees the file.
LAYERS = """
    Functional Model Sequential InputLayer Conv2D DepthwiseConv2D SeparableConv2D Conv2DTranspose
    Dense Flatten Reshape Permute Activation ReLU LeakyReLU PReLU ELU Softmax MaxPooling2D
    AveragePooling2D GlobalMaxPooling2D GlobalAveragePooling2D ZeroPadding2D Cropping2D
    UpSampling2D Dropout SpatialDropout2D GaussianNoise GaussianDropout AlphaDropout
    BatchNormalization LayerNormalization GroupNormalization Add Subtract Multiply Average Maximum
    Minimum Concatenate Rescaling
"""
PARTS_OF_LAYERS = """
    Zeros Ones Constant RandomNormal RandomUniform TruncatedNormal VarianceScaling Orthogonal
    Identity GlorotNormal GlorotUniform HeNormal HeUniform LecunNormal LecunUniform L1 L2 L1L2
    OrthogonalRegularizer MaxNorm NonNeg UnitNorm MinMaxNorm DTypePolicy __keras_tensor__
    __tuple__ TensorShape
"""
ALLOWED = frozenset((LAYERS + PARTS_OF_LAYERS).split())


def refuse_code(config, path):
    """Raise InputError where a config, at any depth, names a class that is not allowed."""
    # The optimizer's part is never read: load_model(compile=False) throws it away unseen.
    unread = [({key: part for key, part in config.items() if key != "compile_config"}, "")]
    while unread:
        value, layer = unread.pop()
        if isinstance(value, dict):
            name = value.get("class_name")
            inner = value.get("config")
            if isinstance(inner, dict) and isinstance(inner.get("name"), str):
                layer = inner["name"]
            if name in ("Lambda", "__lambda__"):
                raise InputError(
                    f"{path}: contains a Lambda layer (layer {layer!r}): "
                    "it could run code from the file"
                )
            if "class_name" in value and (not isinstance(name, str) or name not in ALLOWED):
                raise InputError(
                    f"{path}: contains {name!r} (layer {layer!r}), which is not among the layers "
                    "that this tool loads"
                )
            unread += [(part, layer) for part in value.values()]
        elif isinstance(value, list):
            unread += [(part, layer) for part in value]
