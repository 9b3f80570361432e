"""What leaves Python: a network as plain arrays, which every form of export starts from and every import leads to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minikd.data import Normalisation
from minikd.errors import ArgumentError
from minikd.nn import ACTIVATION_LAYERS, MLP, Dropout, Linear, Module, Sequential

__all__ = ["Layer", "Network"]

NO_ACTIVATION = ""  # of the last layer, whose outputs are the logits


class Layer(NamedTuple):
    """One product: activation(weight·x + bias).

    weight : (m, k) float32.  bias : (m,) float32.  activation : "relu", "gelu", "tanh", "sigmoid", or "" for none.
    """

    weight: np.ndarray
    bias: np.ndarray
    activation: str


@dataclass(frozen=True)
class Network:
    """Layers one after the other, the scale of the features before them, and the names of the classes behind them.

    layers : one at least; the last has no activation.
    mean, deviation : (k,) float32, of raw features: the first layer sees (x - mean) / deviation.
    class_names : one for each logit.
    """

    layers: tuple[Layer, ...]
    mean: np.ndarray
    deviation: np.ndarray
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, model: Module) -> Network:
        """A model's layers in float32, dropout left out; without a normalisation the scale is 0 and 1.

        Raises
        ------
        ArgumentError : it is not a Sequential of Linear layers with activations between them and logits at its end.
        """
        layers = _layers(model)
        inputs, classes = layers[0].weight.shape[1], len(layers[-1].bias)
        scale = model.normalisation
        mean = np.zeros(inputs) if scale is None else np.broadcast_to(scale.mean, inputs)
        deviation = np.ones(inputs) if scale is None else np.broadcast_to(scale.deviation, inputs)
        names = model.class_names or tuple(str(k) for k in range(classes))
        return cls(layers, mean.astype(np.float32), deviation.astype(np.float32), tuple(names))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features, hidden layers, classes."""
        return (self.layers[0].weight.shape[1], *(len(layer.bias) for layer in self.layers))

    @property
    def multiply_adds(self) -> int:
        """Multiply-accumulates of one prediction."""
        return sum(layer.weight.size for layer in self.layers)

    def folded(self) -> Network:
        """The same function of raw features with the scale in the first layer's weights, computed in float64."""
        first = self.layers[0]
        weight = first.weight / self.deviation.astype(np.float64)
        bias = first.bias - weight @ self.mean.astype(np.float64)
        layer = Layer(weight.astype(np.float32), bias.astype(np.float32), first.activation)
        inputs = self.sizes[0]
        plain = np.zeros(inputs, np.float32), np.ones(inputs, np.float32)
        return Network((layer, *self.layers[1:]), *plain, self.class_names)

    def model(self) -> MLP:
        """An MLP that computes this, in evaluation mode.

        Raises
        ------
        ArgumentError : the hidden layers' activations differ from one another, which an MLP's do not.
        """
        kinds = {layer.activation for layer in self.layers[:-1]}
        if len(kinds) > 1:
            got = ", ".join(sorted(kind or "none" for kind in kinds))
            raise ArgumentError("import", "the activations", expected="all alike in the hidden layers", got=got)
        model = MLP(self.sizes, kinds.pop() if kinds else "relu")
        values = itertools.chain.from_iterable((layer.weight, layer.bias) for layer in self.layers)
        model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
        model.normalisation, model.class_names = Normalisation(self.mean, self.deviation), self.class_names
        model.eval()
        return model


def _layers(model: Any) -> tuple[Layer, ...]:
    parts: Sequence[Module] = _flat(model)
    kinds: dict[type, str] = {kind: name for name, kind in ACTIVATION_LAYERS.items()}
    found: list[Layer] = []
    for part in parts:
        if isinstance(part, Linear):
            weight = part.weight.numpy().astype(np.float32)
            bias = np.zeros(len(weight)) if part.bias is None else part.bias.numpy()
            found.append(Layer(weight, bias.astype(np.float32), NO_ACTIVATION))
        elif type(part) in kinds and found and not found[-1].activation:
            found[-1] = found[-1]._replace(activation=kinds[type(part)])
        elif not isinstance(part, Dropout):
            raise _unfit(type(part).__name__)
    if not found or found[-1].activation:
        raise _unfit("one without a last Linear layer")
    return tuple(found)


def _flat(model: Any) -> list[Module]:
    """The parts of nested Sequentials in order."""
    if not isinstance(model, Sequential):
        return [model]
    return [part for layer in model.layers for part in _flat(layer)]


def _unfit(got: str) -> ArgumentError:
    expected = "Linear layers with activations between them, in a Sequential or MLP, which ends in a Linear layer"
    return ArgumentError("export", "model", expected=expected, got=got)
