"""One prediction by the exported C, in float32 and int8, against onnxruntime: the network 64-32-10, sample by sample.

python bench/export_c.py                   needs gcc or the like (or CC), onnx and onnxruntime
python bench/export_c.py --flags="-O3"     another optimisation than -O2

The C is called from a loop in C. onnxruntime is called from Python, one thread, a row at a time: by `run`, and by
`run_with_iobinding` on buffers that were bound once, which is its fastest way. The same is given of a function of the C
that is called through ctypes. All contenders' logits are compared with those of the model before the clock runs, and
they take turns in one process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MINIKD_NUM_THREADS", "1")

import numpy as np

import minikd as kd
from minikd.bench.machine import cpu_model
from minikd.bench.measure import Effort, interleave
from minikd.export.c import to_c
from minikd.export.network import Network
from minikd.export.quantise import quantise
from minikd.export.verify import compiler

SIZES = (64, 32, 10)
BURST = 1000  # predictions of one call into C
LOOP = """
#include "student.h"
void burst(const float *features, float *logits, long count);
void burst(const float *features, float *logits, long count)
{
    while (count-- > 0) {
        (void)student_predict(features, STUDENT_FEATURES, logits, STUDENT_CLASSES);
    }
}
"""


class Exported:
    """The exported C in this process."""

    def __init__(self, folder: Path, flags: list[str], **how: Any) -> None:
        self.logits = np.zeros(SIZES[-1], np.float32)
        self.folder, self.flags, self.how = folder, flags, how

    def load(self, network: Network, x: np.ndarray) -> None:
        """Write, compile and load it, with the sample that it will be asked for."""
        to_c(network, self.folder, **self.how)
        (self.folder / "burst.c").write_text(LOOP)
        command = compiler() or sys.exit("needs a C compiler")
        sources = [str(self.folder / "student.c"), str(self.folder / "burst.c")]
        library = str(self.folder / "student.so")
        flags = ["-std=c99", *self.flags, "-ffp-contract=off", "-shared", "-fPIC"]
        subprocess.run([*command, *flags, *sources, "-o", library], check=True)
        self.library = ctypes.CDLL(library)
        self.sample = np.ascontiguousarray(x, np.float32)
        self.given = ctypes.c_void_p(self.sample.ctypes.data)
        self.put = ctypes.c_void_p(self.logits.ctypes.data)
        self.lengths = ctypes.c_size_t(SIZES[0]), ctypes.c_size_t(SIZES[-1])

    def burst(self) -> None:
        self.library.burst(self.given, self.put, ctypes.c_long(BURST))

    def once(self) -> None:
        self.library.student_predict(self.given, self.lengths[0], self.put, self.lengths[1])


def session(network: Network) -> Any:
    """The network as three nodes, its scale folded into the weights, in onnxruntime with one thread."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    first, last = network.folded().layers
    arrays = {"w1": first.weight, "b1": first.bias, "w2": last.weight, "b2": last.bias}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["u"], transB=1),
        helper.make_node("Relu", ["u"], ["h"]),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["z"], transB=1),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n])
        for name, n in (("x", SIZES[0]), ("z", SIZES[-1]))
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "student", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound(running: Any, x: np.ndarray, logits: np.ndarray) -> Callable[[], None]:
    """A call that computes the logits of x in place, on buffers that are bound once."""
    import onnxruntime

    binding = running.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    into = onnxruntime.OrtValue.ortvalue_from_shape_and_type(logits.shape, np.float32)
    binding.bind_ortvalue_output("z", into)
    running.run_with_iobinding(binding)
    logits[:] = into.numpy()
    return lambda: running.run_with_iobinding(binding)


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--flags", default="-O2", help="of the C compiler, beside -std=c99 -ffp-contract=off")
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    data = kd.data.load("digits")
    model = kd.nn.MLP(list(SIZES), seed=0)
    model.normalisation = data.normalisation
    model.eval()
    network, raw = Network.of(model), data.raw(data.x_train).reshape(-1, SIZES[0]).astype(np.float32)
    x, truth = raw[:1].copy(), model.logits(raw[:1])
    with tempfile.TemporaryDirectory() as temporary:
        flags = options.flags.split()
        exported = Exported(Path(temporary, "float32"), flags)
        small = Exported(Path(temporary, "int8"), flags, quantised=quantise(network, raw))
        running, logits = session(network), np.zeros((1, SIZES[-1]), np.float32)
        for c in (exported, small):
            c.load(network, x)
            c.once()
        by_binding = bound(running, x, logits)
        np.testing.assert_allclose(exported.logits, truth[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(small.logits, truth[0], atol=0.1)
        np.testing.assert_allclose(logits, truth, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(running.run(None, {"x": x})[0], truth, rtol=1e-5, atol=1e-5)
        calls: dict[str, tuple[Callable[[], Any], int]] = {
            "exported C, float32": (exported.burst, BURST),
            "exported C, int8": (small.burst, BURST),
            "exported C, float32, through ctypes": (exported.once, 1),
            "onnxruntime, run": (lambda: running.run(None, {"x": x}), 1),
            "onnxruntime, run_with_iobinding": (by_binding, 1),
        }
        timings = interleave({name: call for name, (call, _) in calls.items()}, Effort(2000, options.seconds))
    print(f"{'-'.join(map(str, SIZES))}, one sample at a time, {options.flags}, {cpu_model()}; all logits agree\n")
    figures = {name: timing.figures() for name, timing in timings.items()}
    fastest = {key: figures["exported C, float32"][key] / BURST for key in ("median_ns", "min_ns")}
    print("| | ns, median | ns, minimum | × exported C, float32 |\n|---|---:|---:|---:|")
    for name, (_, count) in calls.items():
        median, least = (figures[name][key] / count for key in ("median_ns", "min_ns"))
        print(f"| {name} | {median:,.0f} | {least:,.0f} | {median / fastest['median_ns']:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
