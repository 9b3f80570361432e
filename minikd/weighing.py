"""How an objective's terms are weighed against each other on a batch, and what of that deserves a warning.

A term with a weight of 0.5 may have a thousandth of the gradient. What counts is how hard each term pulls at the
weights, and whether the terms pull the same way; both are measured here, on a copy of the model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.errors import DivergenceError
from minikd.kernels.arrays import here, to_host
from minikd.nn import Module
from minikd.objectives import Batch, Objective, Term, as_target
from minikd.peers import Peers
from minikd.tape import no_grad
from minikd.terms import TermMeter
from minikd.training import Training, loss_of

__all__ = [
    "SMALL_SHARE",
    "TermWeight",
    "Weighing",
    "percent",
    "warnings_of",
    "weigh",
    "weigh_first_epoch",
    "weigh_training",
]

SMALL_SHARE = 0.01  # of the gradient: below it a term hardly counts, and above 1 - this the others hardly do


@dataclass(frozen=True)
class TermWeight:
    """One term on one batch, in plain numbers.

    name, formula : of the term; its formula is without the weight.
    weight : as it is at present, where a schedule changes it.
    temperature : T at present; None for a term without one.
    scale_t2 : whether the term is multiplied by T²; None where its formula has no such factor.
    coefficient : weight, times T² where the term has that factor.
    value : what it adds to the loss, weight and all.
    gradient_norm : the L2 norm, over all parameters, of the gradient of `value`.
    share : that norm as a part of all terms' norms; NaN where all of them are 0 or one is not finite.
    """

    name: str
    formula: str
    weight: float
    temperature: float | None
    scale_t2: bool | None
    coefficient: float
    value: float
    gradient_norm: float
    share: float


@dataclass(frozen=True)
class Weighing:
    """All terms on one batch.

    terms : in the objective's order.
    angle : degrees from 0 to 180 between the gradients, over the model's parameters, of the terms that need only labels
        and of those that need a teacher; None where one of the two has no gradient.
    rows, labelled : rows of the batch, and those of them that have a label.
    networks : how many learn together; all figures are of the sum of their losses (see `Peers`).
    probabilities : whose logits look like probabilities, "teacher" or "student".
    moment : when it was, such as "before training".
    """

    terms: tuple[TermWeight, ...]
    angle: float | None
    rows: int
    labelled: int
    networks: int
    probabilities: tuple[str, ...]
    moment: str = ""


# --- measuring ---


def weigh(
    model: Module,
    objective: Objective,
    x: Any,
    y: Any,
    teacher_logits: Any = None,
    *,
    teacher_features: Mapping[str, Any] | None = None,
    progress: float = 0.0,
    moment: str = "",
) -> Weighing:
    """What each term of an objective is worth on a batch; neither the model nor the objective is changed.

    Parameters
    ----------
    model : the student; it is measured in training mode, each term with the same dropout masks.
    objective : see `minikd.objectives`.
    x : (n, k) network inputs.  y : (n,) class ids, -1 for rows without a label.
    teacher_logits : (n, c), for terms that need them.
    teacher_features : name of a teacher's layer → its output (n, h), for terms that compare layers.
    progress : where schedules are, from 0 to 1.
    moment : a word for `Weighing.moment`.

    Raises
    ------
    MinikdError : the batch lacks what a term needs, or shapes do not fit.
    """
    learner, weighed = copy.deepcopy((model, objective))
    real = learner.parameters()[0].dtype
    labels = as_target(to_host(y))
    said = None if teacher_logits is None else np.ascontiguousarray(to_host(teacher_logits), real)
    inputs, target = here.put(np.ascontiguousarray(to_host(x), real)), here.put(labels)
    soft = None if said is None else here.put(said)
    features = {n: here.put(np.ascontiguousarray(to_host(h), real)) for n, h in (teacher_features or {}).items()}
    scores = _prepare(learner, weighed, inputs, soft, target, features)
    numbers = [place.at(progress) for place in weighed.varying()]
    hints = [features[name] for name in weighed.teacher_layers if name in features]
    meter = TermMeter(learner.train(), weighed, loss_of)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*look like probabilities")  # which `probabilities` tells
        values, gradients = meter.gradients(numbers, inputs, soft, target, hints)
    present = weighed.at(numbers).terms
    given = {"teacher": said, "student": scores}
    return Weighing(
        _terms(meter.names, present, values, gradients),
        _angle(*_pulls(present, gradients[:, : model.parameter_count])),
        len(inputs),
        int((labels >= 0).sum()),
        len(model.members) if isinstance(model, Peers) else 1,
        tuple(name for name, z in given.items() if z is not None and F.look_like_probabilities(z)),
        moment,
    )


def weigh_training(training: Training, rows: np.ndarray, moment: str = "") -> Weighing:
    """`weigh` for these rows of a training's data, as the training is at present: its weights and its schedules."""
    inputs, soft, target, hints = training.batch(rows)
    features = dict(zip(training.objective.teacher_layers, hints, strict=True))
    model, objective, progress = training.model, training.objective, training.progress
    return weigh(model, objective, inputs, target, soft, teacher_features=features, progress=progress, moment=moment)


def weigh_first_epoch(training: Training) -> tuple[list[Weighing], list[str]]:
    """A training's first batch weighed before its first step and after its first epoch, which is taken.

    Also in words what went wrong, where the epoch came to no end.
    """
    rows = training.first_rows()
    weighings = [weigh_training(training, rows, "before training")]
    try:
        training.run(epochs=1)
    except DivergenceError as error:
        return weighings, [str(error)]
    return [*weighings, weigh_training(training, rows, "after one epoch")], []


def _prepare(
    model: Module, objective: Objective, inputs: Any, soft: Any, target: Any, features: Mapping[str, Any]
) -> np.ndarray:
    """The model's logits (n, c); on the way an objective that learns along is prepared with what the batch shows."""
    names = objective.student_layers
    with no_grad():
        logits, found = model.eval()(inputs, features=names) if names else (model.eval()(inputs), {})
    if names or objective.teacher_layers:
        objective.prepare(Batch(logits, soft, target, found, features))
    scores: np.ndarray = logits.numpy()
    return scores


def _terms(
    names: Sequence[str], terms: Sequence[Term], values: Sequence[float], gradients: np.ndarray
) -> tuple[TermWeight, ...]:
    norms = np.sqrt(np.einsum("kp,kp->k", gradients, gradients))
    total = float(norms.sum())
    return tuple(
        TermWeight(
            name,
            term.formula,
            float(term.weight),
            _number(term, "temperature"),
            getattr(term, "scale_t2", None),
            term.coefficient(),
            value,
            float(norm),
            float(norm) / total if total and math.isfinite(total) else math.nan,
        )
        for name, term, value, norm in zip(names, terms, values, norms, strict=True)
    )


def _number(term: Term, name: str) -> float | None:
    found = getattr(term, name, None)
    return None if found is None else float(found)


def _pulls(terms: Sequence[Term], gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The summed gradients (p,) of the terms that need only labels, and of those that need a teacher."""
    taught = np.array(["teacher" in term.needs for term in terms])
    return gradients[~taught].sum(axis=0), gradients[taught].sum(axis=0)


def _angle(a: np.ndarray, b: np.ndarray) -> float | None:
    """Degrees between two vectors; None where one is 0 or not finite.

    2·atan2(‖â - b̂‖, ‖â + b̂‖) of the unit vectors, which unlike arccos keeps its digits near 0 and 180.
    """
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(0 < length < math.inf for length in lengths):
        return None
    a, b = a / lengths[0], b / lengths[1]
    return math.degrees(2 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b))))


# --- warnings ---


def warnings_of(
    *weighings: Weighing,
    teacher_accuracy: float | None = None,
    student_accuracy: float | None = None,
    teacher: str = "teacher",
) -> list[str]:
    """What stands out, each in a sentence or two that say what to change; empty where nothing does.

    Parameters
    ----------
    weighings : of one objective, at one moment or at several.
    teacher_accuracy, student_accuracy : of the teacher and of the student without it, both from 0 to 1 and on the same
        rows, best those of the validation part; None where they are not known.
    teacher : what the teacher is called.
    """
    return [
        *_probabilities_as_logits(weighings),
        *_without_t2(weighings),
        *_not_finite(weighings),
        *_out_of_balance(weighings),
        *_worse_teacher(teacher, teacher_accuracy, student_accuracy),
    ]


def _probabilities_as_logits(weighings: Sequence[Weighing]) -> list[str]:
    fixes = {
        "teacher": "Pass its scores before softmax; or log(p), say gives='probabilities' or name a file's array so.",
        "student": "Let it end without a softmax.",
    }
    found = dict.fromkeys(name for weighing in weighings for name in weighing.probabilities)
    return [
        f"The {name}'s logits look like probabilities, which softmax would flatten once more. {fixes[name]}"
        for name in found
    ]


def _without_t2(weighings: Sequence[Weighing]) -> list[str]:
    said: dict[str, str] = {}
    for term in (term for weighing in weighings for term in weighing.terms):
        if term.scale_t2 is False and term.temperature is not None and term.temperature > 1 and term.weight:
            t, t2 = term.temperature, term.temperature**2
            said.setdefault(
                term.name,
                f"{term.name} has a temperature of {t:.3g} and no factor T², so its gradient is only 1/T² = "
                f"1/{t2:.3g} of what it would be with it. Let scale_t2 be True, or multiply its weight by {t2:.3g}.",
            )
    return list(said.values())


def _not_finite(weighings: Sequence[Weighing]) -> list[str]:
    said: dict[str, str] = {}
    for weighing in weighings:
        for term in weighing.terms:
            if not math.isfinite(term.value) or not math.isfinite(term.gradient_norm):
                said.setdefault(
                    term.name,
                    f"{term.name} is {term.value:g} with a gradient of {term.gradient_norm:g}{_when(weighing)}: "
                    "nothing can be learned from that. A divergence is infinite where one side rules a class out "
                    "(logits of -inf, probabilities of 0) and the other does not: SoftLabels, JensenShannon and "
                    "SkewedKL bear a teacher that does so.",
                )
    return list(said.values())


def _out_of_balance(weighings: Sequence[Weighing]) -> list[str]:
    """Terms that have nearly the whole gradient, and where none has, those that have hardly any of it."""
    found: dict[tuple[str, bool], list[tuple[Weighing, TermWeight]]] = {}
    for weighing in weighings:
        pulling = [term for term in weighing.terms if term.weight and not math.isnan(term.share)]
        if len(pulling) < 2:
            continue  # a single term has all of it, as it should
        ruling = [term for term in pulling if term.share > 1 - SMALL_SHARE]
        for term in ruling or [term for term in pulling if term.share < SMALL_SHARE]:
            found.setdefault((term.name, bool(ruling)), []).append((weighing, term))
    return [(_ruling if rules else _idle)(places) for (_, rules), places in found.items()]


def _ruling(places: Sequence[tuple[Weighing, TermWeight]]) -> str:
    weighing, term = places[-1]
    others = [t for t in weighing.terms if t.name != term.name and t.weight]
    rest = sum(t.gradient_norm for t in others)
    verb = "counts" if len(others) == 1 else "count"
    said = f"{term.name} has {_shares(places)}, so that {_listed([t.name for t in others])} hardly {verb}. "
    if rest == 0:
        return said + "No weight mends a gradient of 0: see that the batch has labels, and that the teacher differs."
    half = term.weight * rest / term.gradient_norm
    return said + f"Lower its weight of {term.weight:.3g} (about {half:.2g} would leave it half), or raise the others."


def _idle(places: Sequence[tuple[Weighing, TermWeight]]) -> str:
    weighing, term = places[-1]
    said = f"{term.name} has {_shares(places)}, so that it hardly counts. "
    if term.gradient_norm == 0:
        return said + "No weight mends a gradient of 0: see that the batch has what it needs, or leave it out."
    rest = sum(t.gradient_norm for t in weighing.terms) - term.gradient_norm
    tenth = term.weight * rest / (9 * term.gradient_norm)
    return said + f"Raise its weight of {term.weight:.3g} (about {tenth:.2g} would give it a tenth), or leave it out."


def _shares(places: Sequence[tuple[Weighing, TermWeight]]) -> str:
    """Such as "0.42 % of the gradient before training and 0.3 % after one epoch"."""
    parts = [f"{percent(term.share)} %{{}}{_when(weighing)}" for weighing, term in places]
    return _listed([part.format("" if k else " of the gradient") for k, part in enumerate(parts)])


def percent(share: float) -> str:
    """A share in percent, to three digits; near 1 to two decimals, so that only the whole is 100."""
    return f"{math.floor(10_000 * share) / 100:g}" if share > 1 - SMALL_SHARE else f"{100 * share:.3g}"


def _when(weighing: Weighing) -> str:
    return f" {weighing.moment}" if weighing.moment else ""


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _worse_teacher(name: str, teacher: float | None, student: float | None) -> list[str]:
    if teacher is None or student is None or teacher >= student:
        return []
    return [
        f"The {name} is right in {100 * teacher:.1f} % of the rows and the student without it in {100 * student:.1f} "
        "%: a teacher that is worse than its student can hardly help. Train it longer (teacher_epochs), make it larger "
        "(teacher), or take another one."
    ]
