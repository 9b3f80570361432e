"""What is measured: each kernel with its inputs, its shapes and the bytes that it has to move, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minikd.kernels.reference import bind_reference
from minikd.ops import OPS, Argument, Shape
from minikd.ops.op import KINDS

Inputs = dict[str, Any]

# Small rows are the common case, wide ones those of language models.
ROWS: tuple[Shape, ...] = ((128, 10), (1024, 10), (128, 100), (1024, 1000), (512, 32000), (64, 128256))
# The parameters of the networks 784-800-800-10 and 784-1200-1200-10.
PARAMETERS: tuple[Shape, ...] = ((1_276_810,), (2_395_210,))

TEMPERATURE, HARD_WEIGHT, SOFT_WEIGHT = 4.0, 0.5, 0.5
DROPPED = 0.5
LR, MOMENTUM, BETA1, BETA2, EPS, STEP = 1e-3, 0.9, 0.9, 0.999, 1e-8, 10


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is measured.

    Attributes
    ----------
    name : as `minikd.kernels.bind` takes it.
    inputs : ``inputs(rng, shape)`` makes the kernel's input buffers by name; every other buffer is an output or None.
    outputs : the buffers that are compared with the reference before the clock runs.
    reads, writes, updates : float32 values that pass between kernel and memory for each element: read, written (which
        costs a read of the cache line besides, "write-allocate"), or read and written in place. A byte is a quarter.
    attrs : the operation's attributes.
    check : ``check(got, inputs)`` gives the error where there is no reference to compare with (random masks).
    """

    name: str
    inputs: Callable[[np.random.Generator, Shape], Inputs]
    outputs: tuple[str, ...]
    reads: float
    writes: float = 0
    updates: float = 0
    shapes: tuple[Shape, ...] = ROWS
    attrs: dict[str, Any] = field(default_factory=dict)
    check: Callable[[dict[str, np.ndarray], Inputs], float] | None = None

    def bytes_moved(self, shape: Shape) -> int:
        """The least number of bytes that float32 buffers of this shape cost, write-allocate included."""
        return int(4 * (self.reads + 2 * self.writes + 2 * self.updates) * np.prod(shape))

    def footprint(self, shape: Shape) -> int:
        """The bytes that the buffers take, which decides whether they fit a cache."""
        return int(4 * (self.reads + self.writes + self.updates) * np.prod(shape))

    def make_inputs(self, shape: Shape) -> Inputs:
        """The inputs for this shape, the same in every process."""
        return self.inputs(np.random.default_rng(20260), shape)

    def buffers(self, inputs: Inputs, real: Any = np.float32) -> dict[str, Any]:
        """Every buffer of the kernel in its order: copies of the inputs, fresh outputs, None for the others."""
        op = OPS[self.name.removesuffix("_vjp")]
        arguments = op.buffers if self.name == op.name else op.vjp_buffers
        sizes: dict[str, int] = {}
        for a in arguments:
            if a.name in inputs:
                sizes |= zip(a.dims, np.shape(inputs[a.name]), strict=False)
        whole = max((np.shape(v) for v in inputs.values()), key=len)

        def buffer(a: Argument) -> Any:
            if a.name in inputs:
                return np.array(inputs[a.name], real if a.kind == "real" else None)
            if a.role not in ("out", "saved", "din"):
                return None
            kind = KINDS[a.kind] or real
            if a.dims == ("*",):
                return np.empty((), kind)  # a loss is measured as its mean
            return np.empty(whole if a.dims == ("...",) else tuple(sizes[d] for d in a.dims), kind)

        return {a.name: buffer(a) for a in arguments}

    def expected(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The outputs of the reference in float64."""
        op = OPS[self.name.removesuffix("_vjp")]
        named = self.buffers(inputs, np.float64)
        bind_reference(self.name)(*named.values(), **{**op.attrs, **self.attrs})()
        return {name: named[name] for name in self.outputs}

    def errors(self, got: dict[str, Any], expected: dict[str, np.ndarray], inputs: Inputs) -> dict[str, float]:
        """The error of each output; not finite where the output is not."""
        if self.check is not None:
            return {self.outputs[0]: self.check(got, inputs)}
        return {name: error(np.asarray(got[name]), expected[name]) for name in self.outputs}


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest |got - expected|, relative to the largest entry of its row; infinite if shapes differ or NaN came."""
    if got.shape != expected.shape:
        return np.inf
    largest = np.abs(expected).max(axis=-1, keepdims=True) if expected.ndim else np.abs(expected)
    worst = float(np.max(np.abs(got - expected) / np.where(largest > 0, largest, 1.0)))
    return worst if np.isfinite(worst) else np.inf


def peer_arrays(kernel: Kernel, inputs: Inputs) -> list[np.ndarray]:
    """The arrays that a peer's function takes, in order; the numbers among the inputs are constants of its code.

    For the vjp of GELU that is u = x + b in place of x and b: a framework has kept it from its forward pass.
    """
    if kernel.name == "bias_gelu_vjp":
        return [inputs["dy"], inputs["x"] + inputs["b"]]
    return [value for value in inputs.values() if np.ndim(value)]


# --- inputs ---


def _normal(rng: np.random.Generator, shape: Shape, scale: float = 1.0) -> Any:
    return np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)


def _rows_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"x": _normal(rng, shape, 3.0), "temperature": np.array(1.0)}


def _rows_vjp_in(logarithm: bool) -> Callable[[np.random.Generator, Shape], Inputs]:
    def inputs(rng: np.random.Generator, shape: Shape) -> Inputs:
        dy, log_p = _normal(rng, shape), _log_softmax(_normal(rng, shape, 3.0))
        return {"dy": dy, "y": log_p if logarithm else np.exp(log_p), "temperature": np.array(1.0)}

    return inputs


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _distillation_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {
        "student_logits": _normal(rng, shape, 3.0),
        "teacher_logits": _normal(rng, shape, 3.0),
        "target": rng.integers(0, shape[1], shape[0]),
        "temperature": np.array(TEMPERATURE),
        "hard_weight": np.array(HARD_WEIGHT),
        "soft_weight": np.array(SOFT_WEIGHT),
    }


def _cross_entropy_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"logits": _normal(rng, shape, 3.0), "target": rng.integers(0, shape[1], shape[0])}


def _soft_cross_entropy_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"logits": _normal(rng, shape, 3.0), "target": np.exp(_log_softmax(_normal(rng, shape, 3.0)))}


def _argmax_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"x": _normal(rng, shape)}


def _take_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"x": _normal(rng, shape), "rows": rng.permutation(shape[0])}


def _take_scaled_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    pixels, scale = rng.integers(0, 256, shape, np.uint8), rng.uniform(0.5, 2, shape[1]).astype(np.float32)
    return {"x": pixels, "rows": rng.permutation(shape[0]), "scale": scale / 255, "shift": -scale / 2}


def _kl_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    student, teacher = (_log_softmax(_normal(rng, shape, 3.0)) for _ in "st")
    return {"input": student, "target": np.exp(teacher)}


def _bias_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"x": _normal(rng, shape), "b": _normal(rng, shape[1:])}


def _relu_vjp_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"dy": _normal(rng, shape), "y": np.maximum(_normal(rng, shape), 0)}


def _tanh_vjp_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"dy": _normal(rng, shape), "y": np.tanh(_normal(rng, shape))}


def _sigmoid_vjp_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"dy": _normal(rng, shape), "y": 1 / (1 + np.exp(_normal(rng, shape)))}


def _gelu_vjp_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"dy": _normal(rng, shape), **_bias_in(rng, shape)}


def _dropout_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    return {"x": _normal(rng, shape), "step": np.array(STEP)}


def _dropout_error(got: dict[str, np.ndarray], inputs: Inputs) -> float:
    """The error of what was kept; infinite if the share of what was not is more than six deviations from p."""
    y, x = np.asarray(got["y"]), inputs["x"]
    kept = y != 0
    deviation = np.sqrt(DROPPED * (1 - DROPPED) / x.size)
    if y.shape != x.shape or abs(kept.mean() - (1 - DROPPED)) > 6 * deviation:
        return np.inf
    return error(np.where(kept, y, 0), np.where(kept, x.astype(np.float64) / (1 - DROPPED), 0))


def _adam_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    w, m, g = (_normal(rng, shape, scale) for scale in (0.05, 0.01, 0.1))
    return {"w": w, "m": m, "v": _normal(rng, shape, 0.1) ** 2, "g": g, "lr": np.array(LR), "step": np.array(STEP)}


def _sgd_in(rng: np.random.Generator, shape: Shape) -> Inputs:
    w, v, g = (_normal(rng, shape, scale) for scale in (0.05, 0.1, 0.1))
    return {"w": w, "v": v, "g": g, "lr": np.array(LR)}


# --- the kernels ---

_LOSS, _VJP = ("loss", "gradient"), ("dx", "db")

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("distillation_loss", _distillation_in, _LOSS, reads=2, writes=1),
        Kernel("softmax", _rows_in, ("y",), reads=1, writes=1),
        Kernel("softmax_vjp", _rows_vjp_in(False), ("dx",), reads=2, writes=1),
        Kernel("log_softmax", _rows_in, ("y",), reads=1, writes=1),
        Kernel("log_softmax_vjp", _rows_vjp_in(True), ("dx",), reads=2, writes=1),
        Kernel("cross_entropy", _cross_entropy_in, _LOSS, reads=1, writes=1),
        Kernel("soft_cross_entropy", _soft_cross_entropy_in, _LOSS, reads=2, writes=1),
        Kernel("kl_div", _kl_in, _LOSS, reads=2, writes=1, attrs={"reduction": "batchmean"}),
        Kernel("bias_relu", _bias_in, ("y",), reads=1, writes=1),
        Kernel("bias_relu_vjp", _relu_vjp_in, _VJP, reads=2, writes=1),
        Kernel("bias_tanh", _bias_in, ("y",), reads=1, writes=1),
        Kernel("bias_tanh_vjp", _tanh_vjp_in, _VJP, reads=2, writes=1),
        Kernel("bias_sigmoid", _bias_in, ("y",), reads=1, writes=1),
        Kernel("bias_sigmoid_vjp", _sigmoid_vjp_in, _VJP, reads=2, writes=1),
        Kernel("bias_gelu", _bias_in, ("y",), reads=1, writes=1),
        Kernel("bias_gelu_vjp", _gelu_vjp_in, _VJP, reads=2, writes=1),
        Kernel(
            "dropout",
            _dropout_in,
            ("y",),
            reads=1,
            writes=2,  # y and the mask
            attrs={"p": DROPPED, "seed": 1, "stream": 0},
            check=_dropout_error,
        ),
        Kernel("take", _take_in, ("y",), reads=1, writes=1),
        Kernel("take_scaled", _take_scaled_in, ("y",), reads=0.25, writes=1),
        Kernel("argmax", _argmax_in, ("y",), reads=1),
        Kernel("correct_count", _cross_entropy_in, ("count",), reads=1),
        Kernel(
            "adam_step",
            _adam_in,
            ("w", "m", "v"),
            reads=1,
            updates=3,
            shapes=PARAMETERS,
            attrs={"beta1": BETA1, "beta2": BETA2, "eps": EPS},
        ),
        Kernel("sgd_step", _sgd_in, ("w", "v"), reads=1, updates=2, shapes=PARAMETERS, attrs={"momentum": MOMENTUM}),
    )
}

# What `--quick` measures.
QUICK: dict[str, tuple[Shape, ...]] = {
    "distillation_loss": ((128, 10), (1024, 1000)),
    "softmax": ((128, 10), (1024, 1000)),
    "adam_step": PARAMETERS[:1],
}


def shape_text(shape: Shape) -> str:
    """A shape as it stands on the command line: 128x10."""
    return "x".join(map(str, shape))
