"""ONNX Runtime: the network as a graph of Gemm, Relu and Softmax, from a NumPy array to a NumPy array."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from minikd.bench.contenders import Bound
from minikd.bench.steps.cases import Network, Step, pairs
from minikd.bench.steps.contenders import one_by_one

helper: Any = import_module("onnx.helper")
numpy_helper: Any = import_module("onnx.numpy_helper")
onnxruntime: Any = import_module("onnxruntime")

FLOAT = 1  # onnx.TensorProto.FLOAT
OPSET, IR_VERSION = 17, 8


def make(form: str, step: Step, inputs: dict[str, Any]) -> Bound:
    """A session with as many threads as OMP_NUM_THREADS says, else as many as it likes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = onnxruntime.InferenceSession(graph(inputs["network"]), options, providers=["CPUExecutionProvider"])
    run = session.run
    return one_by_one(step, step.batches(inputs), lambda x: run(None, {"x": x})[0])


def graph(network: Network) -> bytes:
    """The serialised model from x to probabilities."""
    nodes, initialisers, name = [], [], "x"
    layers = pairs(network)
    for k, layer in enumerate(layers):
        named = [f"{kind}{k}" for kind in "wb"]
        initialisers += [numpy_helper.from_array(a, n) for a, n in zip(layer, named, strict=True)]
        last = k == len(layers) - 1
        nodes.append(helper.make_node("Gemm", [name, *named], [f"z{k}"], transB=1))
        name = "y" if last else f"h{k}"
        nodes.append(helper.make_node("Softmax" if last else "Relu", [f"z{k}"], [name]))
    x, y = (
        helper.make_tensor_value_info(name, FLOAT, ["batch", size])
        for name, size in (("x", network[0].shape[1]), ("y", len(network[-1])))
    )
    whole = helper.make_graph(nodes, "network", [x], [y], initialisers)
    opsets = [helper.make_opsetid("", OPSET)]
    return bytes(helper.make_model(whole, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())
