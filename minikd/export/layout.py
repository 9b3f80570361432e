"""What the exported C holds: its constant tables by name, and the buffers that one prediction needs."""

from __future__ import annotations

import numpy as np

from minikd.export.network import Network
from minikd.export.quantise import Quantised
from minikd.export.reference import has_scale

__all__ = ["buffers", "tables"]


def tables(model: Network | Quantised) -> dict[str, np.ndarray]:
    """The constant arrays under their names in the C, each with the type and in the order that it has there.

    Weights of float32 are (k, m), so that those of one input lie side by side; weights of int8 are (m, k). A scale
    that is the same for all features is no array.
    """
    found: dict[str, np.ndarray] = {}
    if has_scale(model):
        scale = {"mean": model.mean, "deviation": model.deviation}
        found |= {name: values for name, values in scale.items() if (values != values[0]).any()}
    if isinstance(model, Network):
        for number, layer in enumerate(model.layers, 1):
            found[f"weight_{number}"] = np.ascontiguousarray(layer.weight.T)
            found[f"bias_{number}"] = layer.bias
        return found
    for number, part in enumerate(model.layers, 1):
        found[f"weight_{number}"] = part.weight
        found[f"bias_{number}"] = part.folded_bias.astype(np.int32)
        found[f"multiplier_{number}"] = part.multiplier
        found[f"shift_{number}"] = part.shift.astype(np.uint8)
        if part.table is not None:
            found[f"table_{number}"] = part.table
    return found


def buffers(model: Network | Quantised) -> dict[str, int]:
    """The lengths of the two buffers "a" and "b" that values between the layers lie in by turns, without empty ones.

    The first layer reads the caller's features, or their scaled copy in "a" where there is a scale and no int8; the
    last writes the caller's logits.
    """
    between = [*model.sizes[1:-1]]
    if isinstance(model, Network) and has_scale(model):
        between.insert(0, model.sizes[0])
    lengths = {"a": max(between[0::2], default=0), "b": max(between[1::2], default=0)}
    return {name: length for name, length in lengths.items() if length}
