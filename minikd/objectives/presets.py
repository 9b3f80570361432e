"""Objectives as other toolkits define them, under the names of their own options.

What toolkits call alpha, and whether they multiply by T², differs; here each is written out once. A term of weight 0
is left out, so that it asks for no labels and no teacher.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from minikd.errors import ArgumentError
from minikd.objectives.labels import HardLabels, LogitRegression, SoftCrossEntropy, SoftLabels
from minikd.objectives.objective import Objective, Sum, Term

__all__ = ["PRESETS", "preset"]


def _share(where: str, argument: str, value: float) -> float:
    """A number from 0 to 1 that divides a weight between two terms."""
    if not 0 <= value <= 1:
        raise ArgumentError(where, argument, expected="between 0 and 1", got=repr(value))
    return value


def _weighed(where: str, *terms: Term) -> Objective:
    """The sum of the terms whose weight is not 0."""
    left = [term for term in terms if term.weight]
    if not left:
        fix = "Something must teach the student."
        raise ArgumentError(where, "the weights", expected="not all 0", got="only zeros", fix=fix)
    return left[0] if len(left) == 1 else Sum(left)


def hinton(*, temperature: float = 2.0, hard_weight: float = 0.5, soft_weight: float = 1.0) -> Objective:
    """hard_weight·CE + soft_weight·T²·KL: both means over rows; the published speech model has T = 2 and 0.5 : 1.

    On MNIST the paper found temperatures above 8 alike with 300 units in each layer, and 2.5 to 4 best with 30. It
    gives the hard labels "a considerably lower weight".

    Source: Hinton, Vinyals and Dean 2015, sec. 2, 3 and 4.1.
    """
    soft = SoftLabels(weight=soft_weight, temperature=temperature)
    return _weighed("hinton", HardLabels(weight=hard_weight), soft)


def torchdistill(*, temperature: float = 1.0, alpha: float = 0.5, beta: float | None = None) -> Objective:
    """alpha·CE + beta·T²·KL, where beta is 1 - alpha if it is not given: alpha weights the hard labels.

    KL is PyTorch's "batchmean", the mean over rows. With alpha = 0 that toolkit returns KL alone, without T² and
    without beta, and so does this preset. Its class has no defaults; T = 1 and alpha = 0.5 are those of its
    published ResNet-18 from ResNet-34.

    Source: torchdistill, losses/mid_level.py (KDLoss); configs/…/kd-resnet18_from_resnet34.yaml.
    """
    _share("torchdistill", "alpha", alpha) if beta is None else None
    if alpha == 0:
        return SoftLabels(temperature=temperature, scale_t2=False)
    soft = SoftLabels(weight=1 - alpha if beta is None else beta, temperature=temperature)
    return _weighed("torchdistill", HardLabels(weight=alpha), soft)


def repdistiller(
    *,
    gamma: float = 0.1,
    alpha: float = 0.9,
    beta: float = 0.0,
    kd_T: float = 4.0,
    other: Objective | None = None,
) -> Objective:
    """gamma·CE + alpha·T²·KL + beta·other: alpha weights the soft labels, and the weights need not sum to 1.

    KL is summed and divided by the number of rows. The defaults of gamma, alpha and beta are those of its example of
    plain distillation (-r 0.1 -a 0.9 -b 0); T = 4 is its default. `other` is any objective, whose weights beta
    multiplies; left out it is T²·KL once more, as there with ``--distill kd``.

    Source: RepDistiller, README, train_student.py and distiller_zoo/KD.py (Tian, Krishnan and Isola 2020).
    """
    soft = SoftLabels(weight=alpha, temperature=kd_T)
    others = [SoftLabels(temperature=kd_T)] if other is None else list(other.terms)
    scaled = [term.replaced("weight", beta * term.weight) for term in others]
    return _weighed("repdistiller", HardLabels(weight=gamma), soft, *scaled)


def textbrewer(
    *,
    temperature: float = 4.0,
    kd_loss_type: str = "ce",
    kd_loss_weight: float = 1.0,
    hard_label_weight: float = 0.0,
) -> Objective:
    """hard_label_weight·CE + kd_loss_weight·soft, without any T²: raise kd_loss_weight by T² to keep its size.

    With kd_loss_type "ce" soft is the cross-entropy of the softened probabilities, the mean over rows; with "mse" the
    squared distance of the logits divided by T, the mean over all elements. By default there is no hard term at all.
    Its schedulers of weights are a `weight_schedule` here, "linear(1, 0)" for its linear_decay; its probability_shift
    is `CorrectedSoftLabels`.

    Source: TextBrewer, configurations.py (DistillationConfig), losses.py and distiller_basic.py (Yang et al. 2020).
    """
    hard = HardLabels(weight=hard_label_weight)
    if kd_loss_type == "ce":
        soft = SoftCrossEntropy(weight=kd_loss_weight, temperature=temperature, scale_t2=False)
        return _weighed("textbrewer", hard, soft)
    if kd_loss_type != "mse":
        raise ArgumentError("textbrewer", "kd_loss_type", expected="'ce' or 'mse'", got=repr(kd_loss_type))
    if not temperature > 0:
        raise ArgumentError("textbrewer", "temperature", expected="a finite number above 0", got=repr(temperature))
    # LogitRegression is half of the mean square, of logits that are not divided by T.
    weight = 2 * kd_loss_weight / temperature**2
    return _weighed("textbrewer", hard, LogitRegression(weight=weight, centred=False))


def keras(*, alpha: float = 0.1, temperature: float = 3.0, scale_t2: bool = True) -> Objective:
    """alpha·CE + (1 - alpha)·T²·KL: alpha weights the hard labels; both means over rows.

    The example on keras.io had no T² at first: scale_t2=False is that version. It defines T = 3 and is run with T = 10.
    Keras clips probabilities at 1e-7 in its KLDivergence; this does not.

    Source: keras.io, examples/vision/knowledge_distillation (Borup 2020), class Distiller.
    """
    _share("keras", "alpha", alpha)
    soft = SoftLabels(weight=1 - alpha, temperature=temperature, scale_t2=scale_t2)
    return _weighed("keras", HardLabels(weight=alpha), soft)


PRESETS: dict[str, Callable[..., Objective]] = {
    function.__name__: function for function in (hinton, torchdistill, repdistiller, textbrewer, keras)
}


def preset(name: str, **options: Any) -> Objective:
    """The objective that a toolkit defines, with the options that it has, under its own names for them.

    Parameters
    ----------
    name : "hinton", "torchdistill", "repdistiller", "textbrewer" or "keras".
    options : see `PRESETS[name]`.

    Raises
    ------
    ArgumentError : an unknown name or option, or a value out of its range.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        fix = f'Did you mean "{near[0]}"?' if near else ""
        raise ArgumentError("preset", "name", expected="one of " + ", ".join(PRESETS), got=repr(name), fix=fix)
    known = inspect.signature(PRESETS[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        expected = f"among those of {name}: " + ", ".join(known)
        raise ArgumentError("preset", "options", expected=expected, got=", ".join(unknown))
    return PRESETS[name](**options)
