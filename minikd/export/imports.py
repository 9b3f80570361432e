"""Networks from elsewhere, as MLPs that predict from raw features: of scikit-learn and of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from minikd.data import Normalisation
from minikd.errors import ArgumentError
from minikd.export.assembly import Refuse, Scale, assembled, real
from minikd.export.network import NO_ACTIVATION, Layer
from minikd.nn import ACTIVATION_LAYERS, MLP
from minikd.ops.elementwise import ACTIVATIONS
from minikd.teachers.teacher import library

__all__ = ["from_pytorch", "from_scikit_learn"]

# --- scikit-learn ---

SKLEARN_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "logistic": "sigmoid", "identity": NO_ACTIVATION}
# Scaler → the factor and the offset of what it does to features.
SCALERS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "StandardScaler": lambda s: _centred(s.mean_ if s.with_mean else None, s.scale_ if s.with_std else None),
    "RobustScaler": lambda s: _centred(s.center_ if s.with_centering else None, s.scale_ if s.with_scaling else None),
    "MinMaxScaler": lambda s: (s.scale_, s.min_),
    "MaxAbsScaler": lambda s: (1 / s.scale_, 0.0),
}


def _centred(mean: Any, deviation: Any) -> tuple[Any, Any]:
    """Factor and offset of (x - mean) / deviation, where None leaves a part out."""
    factor = 1.0 if deviation is None else 1 / np.asarray(deviation)
    return factor, 0.0 if mean is None else -np.asarray(mean) * factor


def from_scikit_learn(model: Any) -> MLP:
    """An MLP from a fitted MLPClassifier, or from a Pipeline of scalers and one, ready to predict from raw features.

    Class k is the k-th of `classes_`, whose texts become the names. The one output z of two classes becomes the logits
    (0, z), whose softmax is the sigmoid of z. Weights become float32. Scalers that are understood: StandardScaler,
    RobustScaler, MinMaxScaler, MaxAbsScaler.

    Raises
    ------
    ArgumentError : another kind of model, one that is not fitted, labels several classes at once, or has linear hidden
        layers; another step in the pipeline, or a scaler that clips.
    """

    def refuse(part: str, expected: str, got: str) -> NoReturn:
        raise ArgumentError("from_scikit_learn", part, expected=expected, got=got)

    *before, network = [step for _, step in model.steps] if hasattr(model, "steps") else [model]
    if not all(hasattr(network, name) for name in ("coefs_", "intercepts_", "classes_", "out_activation_")):
        refuse("model", "a fitted MLPClassifier, or a Pipeline that ends in one", type(network).__name__)
    kind = SKLEARN_ACTIVATIONS[network.activation]
    products = zip(network.coefs_, network.intercepts_, strict=True)
    layers = [Layer(real(weight.T), real(bias), kind) for weight, bias in products]
    weight, bias, _ = layers.pop()
    if network.out_activation_ == "logistic":
        if len(network.classes_) != 2 or len(bias) != 1:
            refuse("model", "one that gives each sample one class", "one that labels several at once")
        weight, bias = (np.concatenate([np.zeros_like(v), v]) for v in (weight, bias))
    layers.append(Layer(weight, bias, NO_ACTIVATION))
    return assembled(layers, _scale_of(before, refuse), [str(name) for name in network.classes_], refuse)


def _scale_of(steps: Sequence[Any], refuse: Refuse) -> Scale:
    """What a pipeline's steps before its network do to the features."""
    scale = Scale()
    for step in steps:
        kind = type(step).__name__
        if step is None or isinstance(step, str):  # "passthrough"
            continue
        if kind not in SCALERS or not hasattr(step, "n_features_in_") or getattr(step, "clip", False):
            got = f"{kind} with clip=True" if getattr(step, "clip", False) else kind
            refuse("a step before the network", "a fitted " + " or ".join(SCALERS) + ", which does not clip", got)
        scale.then(*SCALERS[kind](step))
    return scale


# --- PyTorch ---

TORCH_ACTIVATIONS = {kind.__name__: name for name, kind in ACTIVATION_LAYERS.items()}
TORCH_ENDINGS = ("Softmax", "LogSoftmax")
TORCH_PASSED = ("Dropout", "Flatten", "Identity")  # which change nothing in rows of features that are predicted


def from_pytorch(
    source: Any,
    activation: str | None = None,
    *,
    normalisation: Normalisation | None = None,
    class_names: Sequence[str] | None = None,
) -> MLP:
    """An MLP from a torch.nn.Sequential of Linear layers and activations, or from a state dict of Linear layers.

    Understood in a Sequential: Linear, ReLU, GELU (the exact one), Tanh, Sigmoid; nested ones; Dropout, Identity and
    Flatten are left out, and Softmax or LogSoftmax at the end. Weights become float32.

    Parameters
    ----------
    source : the Sequential, or its state dict with PyTorch tensors or arrays: weights and biases in order, under any
        names that end in "weight" and "bias".
    activation : that of a state dict's hidden layers, which it does not tell: "relu" (if None), "gelu", "tanh",
        "sigmoid". Of a Sequential, it must be the one that it has.
    normalisation : of the raw features; None where the network takes them as they are.
    class_names : one for each class, or None for their numbers.

    Raises
    ------
    ArgumentError : a layer that is not understood, by its name; weights that do not fit each other; one output only.
    """

    def refuse(part: str, expected: str, got: str) -> NoReturn:
        raise ArgumentError("from_pytorch", part, expected=expected, got=got)

    if activation is not None and activation not in ACTIVATIONS:
        refuse("activation", "one of " + ", ".join(ACTIVATIONS), repr(activation))
    if isinstance(source, Mapping):
        layers = _of_state(source, activation or "relu", refuse)
    else:
        layers = _of_modules(source, refuse)
        found = {layer.activation for layer in layers[:-1]} - {activation}
        if activation is not None and found:
            refuse("activation", "the one of the Sequential: " + ", ".join(sorted(found)), repr(activation))
    if layers and len(layers[-1].bias) == 1:
        refuse("the last layer", "one with an output for each class (two for a score z: 0 and z)", "one output")
    scale = Scale()
    if normalisation is not None:
        scale.then(
            *_centred(*(np.array(v, np.float64, ndmin=1) for v in (normalisation.mean, normalisation.deviation)))
        )
    return assembled(layers, scale, class_names, refuse)


def _of_state(state: Mapping[str, Any], activation: str, refuse: Refuse) -> list[Layer]:
    """Layers in the order of the state dict's weights."""
    weights: dict[str, np.ndarray] = {}
    biases: dict[str, np.ndarray] = {}
    for name, value in state.items():
        layer, _, kind = str(name).rpartition(".")
        if kind not in ("weight", "bias") or len(value.shape) != (2 if kind == "weight" else 1):
            got = f"{name} of shape {tuple(value.shape)}"
            refuse("source", "a state dict of Linear layers: weights (m, k) and biases (m,)", got)
        (weights if kind == "weight" else biases)[layer] = real(value)
    if strange := sorted(biases.keys() - weights.keys()):
        refuse("source", "a state dict with a weight for each bias", f"{strange[0]}.bias alone")
    layers = [Layer(w, biases.get(name, np.zeros(len(w), np.float32)), activation) for name, w in weights.items()]
    return [*layers[:-1], *(layer._replace(activation=NO_ACTIVATION) for layer in layers[-1:])]


def _of_modules(source: Any, refuse: Refuse) -> list[Layer]:
    """Layers of a Sequential, or of a Linear layer alone."""
    nn = library("torch", "test-teachers", "from_pytorch").nn
    layers: list[Layer] = []
    parts = list(_flat(nn, source, ""))
    for name, part in parts:
        kind = type(part).__name__
        if isinstance(part, nn.Linear):
            weight = real(part.weight)
            bias = np.zeros(len(weight), np.float32) if part.bias is None else real(part.bias)
            layers.append(Layer(weight, bias, NO_ACTIVATION))
        elif kind in TORCH_ACTIVATIONS and layers and not layers[-1].activation:
            if getattr(part, "approximate", "none") != "none":
                refuse(f"part {name!r}", "the exact GELU", f"GELU(approximate={part.approximate!r})")
            layers[-1] = layers[-1]._replace(activation=TORCH_ACTIVATIONS[kind])
        elif kind not in TORCH_PASSED and not (kind in TORCH_ENDINGS and part is parts[-1][1]):
            known = ", ".join(["Linear", *TORCH_ACTIVATIONS, *TORCH_PASSED])
            refuse(f"part {name!r}", f"one of {known}, and one activation after each hidden Linear layer", kind)
    return layers


def _flat(nn: Any, part: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The parts of nested Sequentials in order, with dotted names."""
    if isinstance(part, nn.Sequential):
        for inner, child in part.named_children():
            yield from _flat(nn, child, f"{name}.{inner}".lstrip("."))
    else:
        yield name, part
