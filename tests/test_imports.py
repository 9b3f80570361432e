"""Networks of scikit-learn and PyTorch become MLPs that predict the same from raw features, or are refused in words."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd.data import Normalisation
from minikd.errors import ArgumentError
from minikd.export import from_pytorch, from_scikit_learn

RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(60, 6)) + 5).astype(np.float32)


def library(name: str) -> Any:
    """An optional library, or a skip that says what is needed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"needs {name}: pip install 'minikd[test-teachers]'")


# --- scikit-learn ---


def fitted(classes: Any, scaler: Any = None, **settings: Any) -> Any:
    """A classifier that was trained for a moment, behind a scaler if one is given."""
    network = library("sklearn.neural_network").MLPClassifier(
        **{"hidden_layer_sizes": (8, 5), "max_iter": 3, "random_state": 0, **settings}
    )
    pipeline = library("sklearn.pipeline").Pipeline([("scale", scaler), ("network", network)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that three epochs are few
        return (network if scaler is None else pipeline).fit(X, classes)


def labels(*names: Any) -> np.ndarray:
    return np.array(names)[np.arange(len(X)) % len(names)]


@pytest.mark.parametrize("names", [("a", "b"), (3, 5, 7), ("naïve", 'do"g', "✓", "")])
@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic"])
def test_a_classifier_of_scikit_learn_predicts_the_same(activation: str, names: tuple[Any, ...]) -> None:
    estimator = fitted(labels(*names), activation=activation)
    model = from_scikit_learn(estimator)
    np.testing.assert_allclose(model.predict_proba(X), estimator.predict_proba(X), atol=1e-6)
    assert model.class_names == tuple(str(name) for name in estimator.classes_)
    assert np.array_equal(estimator.classes_[model.predict(X)], estimator.predict(X))
    assert not model.training


SCALERS: dict[str, dict[str, Any]] = {
    "StandardScaler": {},
    "StandardScaler without a mean": {"with_mean": False},
    "StandardScaler without a deviation": {"with_std": False},
    "StandardScaler without either": {"with_mean": False, "with_std": False},
    "RobustScaler": {},
    "RobustScaler without a center": {"with_centering": False},
    "RobustScaler without a scale": {"with_scaling": False},
    "MinMaxScaler": {"feature_range": (-1, 2)},
    "MaxAbsScaler": {},
}


@pytest.mark.parametrize("name", SCALERS)
def test_a_scaler_before_the_classifier_becomes_the_normalisation(name: str) -> None:
    scaler = getattr(library("sklearn.preprocessing"), name.split()[0])(**SCALERS[name])
    estimator = fitted(labels("a", "b", "c"), scaler)
    np.testing.assert_allclose(from_scikit_learn(estimator).predict_proba(X), estimator.predict_proba(X), atol=1e-6)


def test_several_scalers_are_one_after_the_other() -> None:
    scalers = library("sklearn.preprocessing")
    make = library("sklearn.pipeline").make_pipeline
    estimator = make(scalers.MinMaxScaler(), "passthrough", None, scalers.StandardScaler(), fitted(labels(0, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(X, labels(0, 1))
    np.testing.assert_allclose(from_scikit_learn(estimator).predict_proba(X), estimator.predict_proba(X), atol=1e-6)


def test_a_classifier_without_hidden_layers_is_one_layer() -> None:
    estimator = fitted(labels(0, 1, 2), hidden_layer_sizes=(), activation="identity")
    model = from_scikit_learn(estimator)
    assert model.sizes == (6, 3)
    np.testing.assert_allclose(model.predict_proba(X), estimator.predict_proba(X), atol=1e-6)


def unfitted() -> Any:
    return library("sklearn.neural_network").MLPClassifier()


def forest() -> Any:
    return library("sklearn.ensemble").RandomForestClassifier(2).fit(X, labels(0, 1))


def several_labels() -> Any:
    return fitted(np.stack([labels(0, 1), labels(1, 0)], axis=1))


def clipping() -> Any:
    return fitted(labels(0, 1), library("sklearn.preprocessing").MinMaxScaler(clip=True))


def components() -> Any:
    return fitted(labels(0, 1), library("sklearn.decomposition").PCA(3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (unfitted, "a fitted MLPClassifier.*got MLPClassifier"),
        (forest, "a fitted MLPClassifier.*got RandomForestClassifier"),
        (several_labels, "one class, got one that labels several at once"),
        (clipping, "a step before the network .*got MinMaxScaler with clip=True"),
        (components, "a step before the network .*got PCA"),
        (lambda: fitted(labels(0, 1), activation="identity"), "the activations .*got none, none, none"),
    ],
)
def test_another_estimator_is_refused_in_words(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        from_scikit_learn(make())


# --- PyTorch ---


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "sigmoid"])
def test_a_sequential_and_its_state_dict_become_the_same_network(activation: str) -> None:
    torch = library("torch")
    nn = torch.nn
    kind = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[activation]
    inner = nn.Sequential(nn.Linear(6, 8), kind(), nn.Dropout(0.5))
    network = nn.Sequential(nn.Flatten(), inner, nn.Identity(), nn.Linear(8, 5, bias=False), kind(), nn.Linear(5, 3))
    network.eval()
    wanted = network(torch.from_numpy(X)).detach().numpy()
    for source in (network, nn.Sequential(network, nn.Softmax(dim=1)), network.double().state_dict()):
        model = from_pytorch(source, activation)
        np.testing.assert_allclose(model.logits(X), wanted, atol=1e-6)
        assert (model.sizes, model.activation, model.class_names) == ((6, 8, 5, 3), activation, ("0", "1", "2"))


def test_an_mlp_goes_to_pytorch_and_comes_back_with_the_same_bits() -> None:
    torch = library("torch")
    nn = torch.nn
    model = kd.nn.MLP([6, 4, 3], "tanh", seed=2)
    model.normalisation = Normalisation(X.mean(axis=0), X.std(axis=0))
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    for source in (network, network.state_dict(), model.state_dict()):
        back = from_pytorch(source, "tanh", normalisation=model.normalisation, class_names=["a", "b", "c"])
        assert np.array_equal(back.logits(X), model.logits(X))
        assert back.class_names == ("a", "b", "c")


def test_a_state_dict_of_arrays_needs_no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    state = {"fc.weight": np.eye(6, dtype=np.float16), "head.weight": np.eye(6)[:2], "head.bias": np.ones(2)}
    np.testing.assert_allclose(from_pytorch(state).logits(X), np.maximum(X, 0)[:, :2] + 1, rtol=1e-6)


def test_a_layer_alone_and_weights_in_bfloat16_come_in() -> None:
    torch = library("torch")
    layer = torch.nn.Linear(6, 3).bfloat16()
    wanted = X @ layer.weight.detach().float().numpy().T + layer.bias.detach().float().numpy()
    for source in (layer, layer.state_dict()):
        np.testing.assert_allclose(from_pytorch(source).logits(X), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"0.weight": np.ones((4, 6)), "1.running_mean": np.ones(4)}, "got 1.running_mean of shape"),
        ({"0.weight": np.ones((4, 6, 1))}, r"got 0.weight of shape \(4, 6, 1\)"),
        ({"0.weight": np.ones((4, 6)), "1.bias": np.ones(4)}, "a weight for each bias, got 1.bias alone"),
        ({"0.weight": np.ones((4, 6)), "1.weight": np.ones((3, 5))}, r"layer 1 must be of weights \(m, 4\)"),
        ({"0.weight": np.ones((4, 6)), "0.bias": np.ones(3)}, "layer 0 must be"),
        ({"0.weight": np.full((4, 6), np.inf)}, "layer 0 must be of finite"),
        ({"0.weight": np.ones((1, 6))}, "an output for each class"),
        ({}, "the network must be one with layers, got none"),
    ],
)
def test_a_state_dict_of_something_else_is_refused(state: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        from_pytorch(state)


def test_parts_that_are_not_understood_are_named() -> None:
    nn = library("torch").nn
    first, last = nn.Linear(6, 4), nn.Linear(4, 3)
    for parts, words in [
        ([first, nn.Sequential(nn.LeakyReLU()), last], "part '1.0' must be one of Linear.*got LeakyReLU"),
        ([first, nn.BatchNorm1d(4), nn.ReLU(), last], "part '1' .*got BatchNorm1d"),
        ([first, nn.GELU("tanh"), last], "part '1' must be the exact GELU"),
        ([first, nn.ReLU(), nn.ReLU(), last], "part '2' .*one activation after each hidden Linear layer, got ReLU"),
        ([nn.ReLU(), first], "part '0' .*got ReLU"),
        ([nn.Softmax(1), first], "part '0' .*got Softmax"),
        ([first, last], "the activations .*got none, none"),
        ([first, nn.ReLU(), last, nn.Sigmoid()], "the activations .*got relu, sigmoid"),
        ([first, nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), last], "all alike, got relu, tanh, none"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            from_pytorch(nn.Sequential(*parts))
    with pytest.raises(ArgumentError, match=r"part '' must be .*got ReLU"):
        from_pytorch(nn.ReLU())
    with pytest.raises(ArgumentError, match="activation must be the one of the Sequential: relu, got 'tanh'"):
        from_pytorch(nn.Sequential(first, nn.ReLU(), last), "tanh")
    with pytest.raises(ArgumentError, match="activation must be one of"):
        from_pytorch({}, "swish")
    with pytest.raises(ArgumentError, match="3 names, got 2"):
        from_pytorch(nn.Linear(4, 3), class_names=["a", "b"])
