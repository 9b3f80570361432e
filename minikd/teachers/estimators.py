"""Estimators as teachers: scikit-learn, XGBoost, LightGBM, and whatever else has their methods."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, BackendError, ShapeError
from minikd.teachers.teacher import LOGITS, PROBABILITIES, Teacher, digest, library

# Method → what it gives, best first: probabilities are calibrated to the classes more often than margins are.
METHODS = {"predict_proba": PROBABILITIES, "decision_function": LOGITS, "predict": PROBABILITIES}
WORTH_THREADS = 1_000_000  # numbers in the features


class EstimatorTeacher(Teacher):
    """An object with predict_proba, decision_function or, as hard labels, predict.

    Columns are put in order by the labels in `classes_`: whole numbers are class ids, texts are looked up in
    class_names. A class that the model never saw has probability 0. The scores of two classes in one column become
    (1 - p, p), or as margins (0, d), whose softmax is the sigmoid of d.
    """

    def __init__(
        self,
        model: Any,
        *,
        gives: str | None = None,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
        identity: str = "",
    ) -> None:
        self.model, self.class_names = model, None if class_names is None else tuple(map(str, class_names))
        wanted = [m for m, kind in METHODS.items() if hasattr(model, m) and gives in (None, kind)]
        if not wanted:
            has = ", ".join(m for m in METHODS if hasattr(model, m))
            fix = "decision_function gives logits; predict_proba and predict give probabilities."
            expected = f"an estimator that gives {gives or 'scores of classes'}"
            raise ArgumentError(
                "as_teacher", "the estimator", expected=expected, got=f"one with {has or 'none'}", fix=fix
            )
        self.method = wanted[0]
        labels = getattr(model, "classes_", None)
        self.ids = None if labels is None else class_ids(labels, self.class_names, classes)
        if classes is None:
            known = -1 if self.ids is None else int(self.ids.max())
            classes = len(self.class_names) if self.class_names else known + 1 or None
        super().__init__(METHODS[self.method], classes, identity)

    def _answer(self, x: Any, rows: Any) -> Any:
        with _fitting_threads(x):
            scores = np.asarray(getattr(self.model, self.method)(x))
        if self.method == "predict" and scores.ndim == 1:
            return self._one_hot(scores)
        if scores.ndim == 1 or scores.shape[1] == 1:  # two classes: the score of the second
            one = scores.reshape(-1)
            scores = np.stack([1 - one if self.gives == PROBABILITIES else np.zeros_like(one), one], axis=1)
        return self._in_order(scores)

    def _in_order(self, scores: np.ndarray) -> np.ndarray:
        """Columns by class id; those of classes that the model does not know are filled."""
        if self.ids is None:
            return scores
        if scores.shape[1:] != self.ids.shape:
            fix = "Of a support vector machine, set decision_function_shape='ovr'."
            expected = f"one column for each of the {len(self.ids)} labels in classes_"
            raise ShapeError(self._name, self.method, expected=expected, got=f"shape {scores.shape}", fix=fix)
        real = scores.dtype if scores.dtype.kind == "f" else np.float32
        absent = 0.0 if self.gives == PROBABILITIES else -np.inf
        ordered = np.full((len(scores), self.classes or 0), absent, real)
        ordered[:, self.ids] = scores
        return ordered

    def _one_hot(self, labels: np.ndarray) -> np.ndarray:
        if self.classes is None:
            fix = "Say classes=… or class_names=…: labels alone do not tell how many there are."
            raise ArgumentError(self._name, "classes", expected="known", got="labels without classes_", fix=fix)
        return np.eye(self.classes, dtype=np.float32)[class_ids(labels, self.class_names, self.classes, unique=False)]

    def _identity(self) -> str:
        kind = f"{type(self.model).__module__}.{type(self.model).__qualname__}"
        names = f" classes {', '.join(self.class_names)}" if self.class_names else ""
        return f"{kind}:{_content(self.model)} by {self.method}{names}"


def _content(model: Any) -> str:
    """A digest of what an estimator learned, from a copy through pickle, as memory is laid out alike in all of those.

    joblib's digest does not depend on how texts and dicts lie in memory either; without joblib, the pickle's does.
    """
    try:
        copy = pickle.loads(pickle.dumps(model))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        fix = "Say identity=…, a name that changes when the model does."
        expected = "a model that can be pickled, which its identity needs"
        raise ArgumentError("as_teacher", "the estimator", expected=expected, got=str(error), fix=fix) from error
    try:
        return f"joblib-{library('joblib').hash(copy, hash_name='sha1')}"
    except BackendError:
        return digest([("pickle", pickle.dumps(copy))])


def class_ids(
    labels: Any, class_names: Sequence[str] | None, classes: int | None, *, unique: bool = True
) -> np.ndarray:
    """Labels as class ids (int64): whole numbers as they are, texts by their place in class_names.

    Numbers that are names as well (classes called "3" and "7") count as names where they are no ids.

    Raises
    ------
    ArgumentError : a label is unknown, out of range, comes twice, or could be both an id and another class's name.
    """
    argument = "the model's classes"
    if isinstance(labels, list) and labels and isinstance(labels[0], np.ndarray):
        fix = "Wrap one of the outputs in a function of its own."
        raise ArgumentError("as_teacher", argument, expected="one list of labels", got=f"{len(labels)} lists", fix=fix)
    array = np.asarray(labels).reshape(-1)
    limit = classes or (len(class_names) if class_names else None)
    whole = array.dtype.kind in "biu" or (array.dtype.kind == "f" and bool((array == np.round(array)).all()))
    ids = array.astype(np.int64) if whole else None
    if ids is not None and (ids.size == 0 or ids.min() < 0 or (limit is not None and ids.max() >= limit)):
        ids = None
    texts = [str(v) for v in (array.astype(np.int64) if whole else array).tolist()]
    place = {name: k for k, name in enumerate(class_names or ())}
    named = np.array([place[t] for t in texts], np.int64) if texts and all(t in place for t in texts) else None
    if ids is not None and named is not None and not np.array_equal(ids, named):
        fix = "Train the teacher on class ids 0 to C-1 in the order of the names, or on the names as text."
        raise ArgumentError("as_teacher", argument, expected="either ids or names", got=", ".join(texts[:10]), fix=fix)
    found = named if ids is None else ids
    if found is None or (unique and len(set(found.tolist())) < len(found)):
        expected = f"class ids from 0 to {limit - 1}" if limit else "class ids from 0"
        expected += f", or the names {', '.join(class_names)}" if class_names else ""
        fix = "" if class_names else "Say class_names=… to have labels looked up by name."
        got = ", ".join(dict.fromkeys(texts[:20])) or "none"
        raise ArgumentError("as_teacher", argument, expected=expected, got=got, fix=fix)
    return found


@contextmanager
def _fitting_threads(x: Any) -> Iterator[None]:
    """One thread for few features, where those of OpenMP mostly wait for one another; else as many as they like."""
    if np.size(x) > WORTH_THREADS or importlib.util.find_spec("threadpoolctl") is None:
        yield
        return
    with library("threadpoolctl").threadpool_limits(1):
        yield


# --- trained on the spot ---

# Name → module, class and settings. The forest has more trees than scikit-learn's 100 because its probabilities are
# shares of trees, and leaves of two rows keep them from being 0 and 1 alone. The boosted trees are as scikit-learn has
# them. The network stops by a part of the rows that it holds back, which spares a guess at the number of epochs.
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rf": ("sklearn.ensemble", "RandomForestClassifier", {"n_estimators": 300, "min_samples_leaf": 2}),
    "gbt": ("sklearn.ensemble", "HistGradientBoostingClassifier", {}),
    "mlp": (
        "sklearn.neural_network",
        "MLPClassifier",
        {"hidden_layer_sizes": (256, 256), "early_stopping": True, "max_iter": 500},
    ),
}


def trained(name: str, x: Any, y: Any, classes: int, seed: int = 0) -> EstimatorTeacher:
    """A scikit-learn classifier fitted to raw features x (n, k) and class ids y (n,); rows with -1 are left out.

    Parameters
    ----------
    name : "rf" (random forest), "gbt" (gradient-boosted trees) or "mlp" (a network behind a scaler).

    Raises
    ------
    ArgumentError : the name is unknown, or fewer than two classes have a label.  BackendError : no scikit-learn.
    """
    if name not in TRAINERS:
        raise ArgumentError("teachers.trained", "name", expected="one of " + ", ".join(TRAINERS), got=repr(name))
    x, y = np.asarray(x), np.asarray(y)
    labelled = y >= 0
    present = len(np.unique(y[labelled]))
    if present < 2:
        expected = "labels of at least two classes"
        raise ArgumentError("teachers.trained", "y", expected=expected, got=f"{present} class(es) with a label")
    module, kind, settings = TRAINERS[name]
    model = getattr(library(module), kind)(random_state=seed, **settings)
    if name == "mlp":
        scaler = library("sklearn.preprocessing").StandardScaler()
        model = library("sklearn.pipeline").make_pipeline(scaler, model)
    with _fitting_threads(x):
        model.fit(x[labelled], y[labelled])
    return EstimatorTeacher(model, classes=classes)
