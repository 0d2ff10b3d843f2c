"""What a detector's .onnx file may contain.

guard.py has the list of all guards, in the order in which they run.
"""

import math

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, check_fits
from defence.load.guard import inspect_file

# What a detector is made of: the layers that guard_model.py allows, as exported, and the
# comparison behind them.
OPERATORS = """
    Add And ArgMax AveragePool Cast Clip Concat Conv ConvTranspose Div Elu Equal Exp Gather Greater
    IsInf IsNaN LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mul Neg Not Or Pad Reciprocal
    ReduceMax ReduceMean ReduceSum Relu Reshape Resize Selu Shape Sigmoid Slice Softmax Softplus
    Softsign Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
BLOCK = 16  # channels that ONNX Runtime's layout in blocks has in each
SHAPE_BYTES = 1024  # of a constant that says a shape, at most: 128 sides
OUTPUTS = {"class": "INT32", "badnet_class": "INT32", "repaired_class": "INT32", "score": "FLOAT"}


def check_onnx(contents, path, max_bytes=DEFAULT_MAX_BYTES):
    """Raise InputError unless bytes are an ONNX model that is a detector and nothing else.

    Returns (shape, largest, in_blocks, metadata): (height, width, channels) of its pictures, the
    values of the largest output of an operator for one of them, whether most of its convolutions'
    multiply-adds give channels in multiples of BLOCK, and its metadata, {str: str}.
    """
    import onnx  # here, because not every user has it

    with inspect_file(path, max_bytes):
        model = onnx.ModelProto()
        model.ParseFromString(contents)
        _check_operators(onnx, model, path)
        _check_tensors(onnx, model.graph, path, max_bytes)
        onnx.checker.check_model(contents)  # the bytes, which it would make of the model again
        shape = _check_ends(onnx, model.graph, path)
        sizes = _sizes_of_outputs(onnx, model, path)
        largest = max(sizes.values())
        check_fits(path, "the largest output of an operator", 8 * largest, max_bytes)
        metadata = {each.key: each.value for each in model.metadata_props}
        return shape, largest, _mostly_in_blocks(model.graph, sizes), metadata


def _check_operators(onnx, model, path):
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise InputError(f"{path}: contains more than one graph of operators")
    if any(each.domain not in ("", "ai.onnx.ml") for each in model.opset_import):
        raise InputError(f"{path}: needs operators that are not ONNX's own")
    for node in graph.node:
        if node.op_type not in OPERATORS.split() or node.domain:
            raise InputError(
                f"{path}: contains the operator {node.op_type!r}, which is not among those that "
                "this tool runs"
            )
    kinds = onnx.AttributeProto
    inside = (kinds.GRAPH, kinds.GRAPHS, kinds.SPARSE_TENSOR)
    if any(each.type in inside for node in graph.node for each in node.attribute):
        raise InputError(f"{path}: contains a graph inside an operator")


def _check_tensors(onnx, graph, path, max_bytes):
    values = [each for node in graph.node for each in node.attribute]
    constants = [each.t for each in values if each.type == onnx.AttributeProto.TENSOR]
    tensors = [*graph.initializer, *constants]
    if any(each.data_location or each.external_data for each in tensors):
        raise InputError(f"{path}: stores values in another file")
    size = sum(8 * math.prod(each.dims) for each in tensors)
    check_fits(path, "its weights", size, max_bytes)


def _check_ends(onnx, graph, path):
    """The shape of a detector's pictures. Raises InputError unless it has its input and outputs."""
    if len(graph.input) != 1:
        raise InputError(f"{path}: not a detector: it takes {len(graph.input)} inputs")
    kind = graph.input[0].type.tensor_type
    shape = tuple(side.dim_value for side in kind.shape.dim[1:])
    if kind.elem_type != onnx.TensorProto.UINT8 or len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{path}: not a detector: its input is not pictures of pixels 0..255")
    found = {
        output.name: onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        for output in graph.output
        if len(output.type.tensor_type.shape.dim) == 1
    }
    if found != OUTPUTS:
        raise InputError(f"{path}: not a detector: its outputs are not {', '.join(OUTPUTS)}")
    return shape


def _sizes_of_outputs(onnx, model, path):
    """How many values each operator gives for one picture: {name: int}. Changes the model."""
    graph = model.graph
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del graph.value_info[:]
    for each in graph.initializer:  # weights, which only take time here: no shape hangs on them
        if len(each.raw_data) > SHAPE_BYTES:
            each.ClearField("raw_data")
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {
        each.name: math.prod(side.dim_value for side in each.type.tensor_type.shape.dim)
        for each in (*known.value_info, *known.output)
        if all(side.HasField("dim_value") for side in each.type.tensor_type.shape.dim)
    }
    unknown = {name for node in graph.node for name in node.output if name} - set(sizes)
    if unknown:
        raise InputError(f"{path}: the size of {min(unknown)!r} cannot be determined")
    return sizes


def _mostly_in_blocks(graph, sizes):
    """Whether most multiply-adds of the convolutions give channels in multiples of BLOCK."""
    kernels, counts = {each.name: each.dims for each in graph.initializer}, {True: 0, False: 0}
    for node in graph.node:
        if node.op_type == "Conv" and (dims := kernels.get(node.input[1])):
            counts[dims[0] % BLOCK == 0] += sizes[node.output[0]] * math.prod(dims[1:])
    return counts[True] >= counts[False]
