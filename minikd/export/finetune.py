"""A student trained on with the roundings of int8 in the loop, so that its weights learn to live with them.

Source: Jacob et al. 2018, sec. 3, with ranges that were calibrated before and stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError
from minikd.export.network import Network
from minikd.export.quantise import LARGEST_WEIGHT, Affine, Quantised, normalised, quantise
from minikd.nn import ACTIVATION_LAYERS, MLP, Linear, Module, Sequential
from minikd.tape import no_grad
from minikd.training import Training

__all__ = ["Finetuned", "Rounded", "finetune"]

EPOCHS, LEARNING_RATE = 20, 0.001


class Rounding(Module):
    """Numbers as int8 would hold them; the gradient goes through.

    affine : how int8 stands for them.
    """

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.scale, self.zero = affine

    def forward(self, x: Any) -> Any:
        return F.fake_quantise(x, self.scale, self.zero)


class RoundedLinear(Module):
    """A Linear with the weights that int8 would hold, and its products rounded where `product` says how.

    The scale of each output's weights is its largest weight / 127, anew in each step, and a constant to the gradient.
    The bias stays as it is: int32 holds it much more finely than anything else is held.
    """

    def __init__(self, linear: Linear, product: Affine | None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.product = None if product is None else Rounding(product)

    def forward(self, x: Any) -> Any:
        with no_grad():
            scale = self.weight.abs().max(axis=1) * (1 / LARGEST_WEIGHT)
        weight = F.fake_quantise(self.weight, scale, low=-LARGEST_WEIGHT, high=LARGEST_WEIGHT)
        y = F.linear(x, weight, self.bias)
        return y if self.product is None else self.product(y)


class RoundedActivation(Module):
    """An activation whose results are rounded as int8 would hold them."""

    def __init__(self, activation: Module, output: Affine) -> None:
        super().__init__()
        self.activation, self.output = activation, Rounding(output)

    def forward(self, x: Any) -> Any:
        return self.output(self.activation(x))


class Rounded(Sequential):
    """A model's layers under their own names, which compute in float what they would give in int8.

    The parameters are the model's: whoever trains this trains the model. Like the model it takes normalised features.

    Parameters
    ----------
    model : an MLP.
    quantised : the same network in int8, whose ranges are taken.
    """

    def __init__(self, model: MLP, quantised: Quantised) -> None:
        parts: list[Module] = []
        layers = iter(quantised.layers)
        activation, output = "", quantised.input
        for part in model.layers:
            if isinstance(part, Linear):
                layer = next(layers)
                activation, output = layer.activation, layer.output
                parts.append(RoundedLinear(part, None if activation == "relu" else layer.product))
            elif activation and type(part) is ACTIVATION_LAYERS[activation]:
                parts.append(RoundedActivation(part, output))
            else:
                parts.append(part)
        super().__init__(*parts)
        self.source = Rounding(quantised.input)

    def _run(self, x: Any, features: Any) -> Any:
        return super()._run(self.source(x), features)


class Finetuned(NamedTuple):
    """What `finetune` gives.

    model : the student in float with its new weights.  quantised : the same in int8.
    before : the student in int8 as it was before.
    history : of the training, a dict of figures for each epoch.
    """

    model: MLP
    quantised: Quantised
    before: Quantised
    history: list[dict[str, Any]]


def finetune(
    model: MLP,
    x: Any,
    y: Any,
    teacher_logits: Any = None,
    *,
    calibration: str = "best",
    on_scale: bool = False,
    epochs: int = EPOCHS,
    lr: float = LEARNING_RATE,
    validation: tuple[Any, Any] | None = None,
    **options: Any,
) -> Finetuned:
    """Train a copy of a student on, as int8 will compute it, against its teacher; the student stays as it is.

    The ranges of inputs, products and results are calibrated before the training on its rows, and kept.

    Parameters
    ----------
    model : an MLP that was trained.
    x : (n, k) raw features.  y : (n,) class ids, -1 for rows without a label.
    teacher_logits : (n, c), or None to learn from the labels alone.
    calibration : see `quantise`.
    on_scale : whether x, and that of `validation`, was normalised already, as the rows of a `Dataset` are.
    epochs, lr : 20 and 0.001, a third of what students begin with.
    validation : (x, y) measured after each epoch, in int8's roundings.
    options : further ones of `minikd.training.fit`: objective, temperature, batch_size, seed, patience, on_epoch.

    Raises
    ------
    ArgumentError : the model is no MLP; and whatever `quantise` and `fit` refuse.  DivergenceError : see `fit`.
    """
    if not isinstance(model, MLP):
        raise ArgumentError("finetune", "model", expected="an MLP", got=type(model).__name__)
    network = Network.of(model)

    def scaled(rows: Any) -> np.ndarray:
        return np.asarray(rows, np.float32) if on_scale else normalised(rows, network.mean, network.deviation)

    rows = scaled(x)
    before = quantise(network, rows, calibration=calibration, on_scale=True)
    student = _copy(model)
    watched = None if validation is None else (scaled(validation[0]), validation[1])
    training = Training(
        Rounded(student, before), rows, y, teacher_logits, epochs=epochs, lr=lr, validation=watched, **options
    ).run()
    student.eval()
    network = Network.of(student)
    after = before.with_weights(network)
    return Finetuned(student, after.measured(network, rows), before, training.history)


def _copy(model: MLP) -> MLP:
    """The same network with parameters of its own, which no optimizer holds."""
    dtype = model.parameters()[0].dtype
    dropouts = {"dropout": model.dropout, "input_dropout": model.input_dropout}
    copy = MLP(model.sizes, model.activation, seed=model.seed, dtype=dtype, **dropouts)
    copy.load_state_dict(model.state_dict())
    copy.normalisation, copy.class_names = model.normalisation, model.class_names
    return copy
