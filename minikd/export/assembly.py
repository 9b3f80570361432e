"""What every import of a network ends in: layers that fit each other and a scale become an MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from minikd.data import Normalisation
from minikd.export.network import NO_ACTIVATION, Layer, Network
from minikd.nn import MLP

__all__ = ["Refuse", "Scale", "assembled", "real"]

Refuse = Callable[[str, str, str], NoReturn]  # which part, what was expected, what came


class Scale:
    """What features go through before the first layer: x·factor + offset, for all columns or for each, in float64."""

    def __init__(self) -> None:
        self.factor: np.ndarray = np.ones(1)
        self.offset: np.ndarray = np.zeros(1)

    def then(self, factor: Any = 1.0, offset: Any = 0.0) -> None:
        """After that, times a factor and plus an offset."""
        with np.errstate(all="ignore"):  # what is not finite is refused in the end
            self.factor = self.factor * factor
            self.offset = self.offset * factor + offset

    def normalisation(self, inputs: int, refuse: Refuse) -> Normalisation:
        """The same as (x - mean) / deviation with float32 numbers for each of the inputs."""
        argument = "the scale of the features"
        for values in (self.factor, self.offset):
            if values.shape not in ((1,), (inputs,)):
                refuse(argument, f"numbers for {inputs} features", f"{values.size} of them")
        with np.errstate(all="ignore"):
            mean = np.broadcast_to(-self.offset / self.factor, inputs).astype(np.float32)
            deviation = np.broadcast_to(1 / self.factor, inputs).astype(np.float32)
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
            refuse(argument, "finite, with factors above 0", f"factors from {self.factor.min()}")
        return Normalisation(mean, deviation)


def assembled(layers: Sequence[Layer], scale: Scale, class_names: Sequence[str] | None, refuse: Refuse) -> MLP:
    """The MLP of these layers; `refuse` is called where they make none."""
    _check(layers, refuse)
    inputs, classes = layers[0].weight.shape[1], len(layers[-1].bias)
    names = tuple(str(k) for k in range(classes)) if class_names is None else tuple(class_names)
    if len(names) != classes:
        refuse("the names of the classes", f"{classes} names", f"{len(names)}")
    normalisation = scale.normalisation(inputs, refuse)
    return Network(tuple(layers), normalisation.mean, normalisation.deviation, names).model()


def _check(layers: Sequence[Layer], refuse: Refuse) -> None:
    """Layers that fit each other, finite, one activation after all but the last."""
    if not layers:
        refuse("the network", "one with layers", "none")
    outputs = None
    for number, layer in enumerate(layers):
        shape = layer.weight.shape
        if len(shape) != 2 or 0 in shape or outputs not in (None, shape[1]) or layer.bias.shape != shape[:1]:
            expected = f"of weights (m, {'k' if outputs is None else outputs}) and a bias (m,)"
            refuse(f"layer {number}", expected, f"of weights {shape} and a bias {layer.bias.shape}")
        if not (np.isfinite(layer.weight).all() and np.isfinite(layer.bias).all()):
            refuse(f"layer {number}", "of finite float32 numbers", "one with NaN or infinity")
        outputs = shape[0]
    kinds = [layer.activation for layer in layers]
    if kinds[-1] or NO_ACTIVATION in kinds[:-1] or len(set(kinds[:-1])) > 1:
        expected = "one after each layer but the last, and all alike"
        refuse("the activations", expected, ", ".join(kind or "none" for kind in kinds))


def real(values: Any) -> np.ndarray:
    """A float32 copy in C order; numbers too large for it become infinite."""
    if hasattr(values, "detach"):  # a tensor of PyTorch, which may have a dtype that NumPy lacks
        values = values.detach().cpu().double().numpy()
    with np.errstate(over="ignore"):
        return np.array(values, np.float32, order="C")
