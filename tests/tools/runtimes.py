"""Run the demo's detector by each runtime that could: what opening it costs, and how fast it is.

    python repair.py models/demo_bd_net.h5 data/demo_clean_validation_data.h5
    pip install ai-edge-litert openvino        beside what requirements.txt has
    python tests/tools/runtimes.py

Each line is of processes of their own, the fastest of REPEAT: to import the runtime and open the
detector, beside NumPy; then pictures a second, on one thread, and the peak memory.
"""

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

from benchmark import table
from world import in_another_process

import utils
from defence.base.startup import import_keras
from defence.judge import backends, onnx_file

REPEAT, BATCHES = 5, (1, 64)
OPEN = {
    "ONNX Runtime": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(FILE, options, providers=["CPUExecutionProvider"])
run = lambda: session.run(["class", "score"], {"pixels": x})
""",
    "LiteRT": """
from ai_edge_litert.interpreter import Interpreter
net = Interpreter(FILE, num_threads=1)
place = net.get_input_details()[0]["index"]
net.resize_tensor_input(place, x.shape)
net.allocate_tensors()
def run():
    net.set_tensor(place, x)
    net.invoke()
    return [net.get_tensor(each["index"]) for each in net.get_output_details()]
""",
    "OpenVINO": """
import openvino
net = openvino.Core().compile_model(FILE, "CPU", {"INFERENCE_NUM_THREADS": 1})
request = net.create_infer_request()
run = lambda: request.infer({"pixels": x})
""",
}
MEASURE = """
import json, os, resource, statistics, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
FILE, count = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).integers(0, 256, (count, 55, 47, 3), np.uint8)
start = time.perf_counter()
{}
opened = time.perf_counter() - start
times = []
for _ in range(max(5, 300 // count)):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([opened, count / statistics.median(times), peak]))
"""


def write_lite(path):
    """Write the demo's detector as a file for LiteRT."""
    logging.disable()
    import_keras()
    import tensorflow as tf

    badnet, repaired = map(utils.read_model, backends.find_models("demo_bd_net"))
    model, classes = backends.load_nets(badnet, repaired, backends.read_usage(badnet, repaired))
    run = onnx_file._add_verdict(model, classes, "")
    converter = tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()], run)
    path.write_bytes(converter.convert())


def measure(runtime, file, count):
    """The least seconds to open it, the most pictures a second, the peak memory in MB."""
    program = MEASURE.format(OPEN[runtime])
    call = [sys.executable, "-c", program, file, str(count)]
    runs = [subprocess.run(call, capture_output=True, text=True) for _ in range(REPEAT)]
    if runs[0].returncode:
        return None
    found = [json.loads(each.stdout.splitlines()[-1]) for each in runs]
    return min(each[0] for each in found), max(each[1] for each in found), found[0][2]


def main():
    with tempfile.TemporaryDirectory() as folder:
        lite = Path(folder, "detector.tflite")
        in_another_process(write_lite, lite)
        onnx = ROOT / "models" / "demo_bd_net_detector.onnx"
        rows = [("runtime", "ms to open", *(f"{n} at a time, a second" for n in BATCHES))]
        rows[0] += ("peak memory, MB, of 1",)
        for runtime in OPEN:
            file = lite if runtime == "LiteRT" else onnx
            one, many = (measure(runtime, file, count) for count in BATCHES)
            if one is None:
                print(f"{runtime} is not installed")
            else:
                rows.append((runtime, 1000 * one[0], one[1], many[1], one[2]))
        table(*rows)
        print(f"bytes of the file: ONNX {onnx.stat().st_size:,}, LiteRT {lite.stat().st_size:,}")


if __name__ == "__main__":
    main()
