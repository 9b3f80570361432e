"""What an exported network takes of a device, told before anything is flashed."""

from __future__ import annotations

import numpy as np

from minikd.export.layout import buffers, tables
from minikd.export.network import Network
from minikd.export.quantise import Quantised

__all__ = ["sizes"]

POINTER = 4  # bytes, as on 32-bit cores
# Bytes of code, measured with gcc -Os for x86-64 and rounded up; instructions of 32-bit cores are no longer.
CODE = {"float32": 1700, "int8": 1700, "relu": 60, "sigmoid": 150, "tanh": 250, "gelu": 500}
CODE_OF_LAYER = {"float32": 60, "int8": 80}
FRAMES = 400  # bytes of stack beside the buffers, of all functions that are open at once


def sizes(network: Network, quantised: Quantised | None = None) -> dict[str, int]:
    """The figures of the C that `to_c` writes of the same arguments; they are macros in its header.

    parameters : weights and biases.
    constant_bytes : all tables and the names of the classes, exactly, with pointers of 4 bytes.
    code_bytes : an estimate, for -Os, without the compiler's own float routines.  flash_bytes : both.
    ram_bytes : what is kept between calls.  stack_bytes : at most, in a call.
    multiply_adds : multiply-accumulates of one prediction.
    """
    model = network if quantised is None else quantised
    constants, code = _constant_bytes(model), _code_bytes(model)
    return {
        "parameters": sum(layer.weight.size + layer.bias.size for layer in network.layers),
        "constant_bytes": constants,
        "code_bytes": code,
        "flash_bytes": constants + code,
        "ram_bytes": 0,
        "stack_bytes": _stack_bytes(model),
        "multiply_adds": network.multiply_adds,
    }


def form(model: Network | Quantised) -> str:
    """ "float32" or "int8"."""
    return "int8" if isinstance(model, Quantised) else "float32"


def _constant_bytes(model: Network | Quantised) -> int:
    names = sum(len(as_utf8(name)) + 1 + POINTER for name in model.class_names)
    return names + sum(table.nbytes for table in tables(model).values())


def as_utf8(name: str) -> bytes:
    """A class name's bytes; halves of surrogate pairs, which have none, become question marks."""
    return name.encode("utf-8", "replace")


def _code_bytes(model: Network | Quantised) -> int:
    kind = form(model)
    used = {layer.activation for layer in model.layers} - {""} if kind == "float32" else set()
    return CODE[kind] + sum(CODE[name] for name in used) + CODE_OF_LAYER[kind] * len(model.layers)


def _stack_bytes(model: Network | Quantised) -> int:
    """The buffers between layers, those for logits and for int8 features, and the functions' own frames."""
    kind, (features, *_, classes) = form(model), model.sizes
    numbers = sum(buffers(model).values()) + classes
    if kind == "int8":
        numbers += features
    return numbers * np.dtype(kind).itemsize + FRAMES
