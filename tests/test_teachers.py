"""Teachers: every kind keeps the same promises, with the real library where it is installed, and errors help."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd.errors import ArgumentError, BackendError, DataError, ModelFormatError, ShapeError
from minikd.teachers import Ensemble, HardLabels, StoreTeacher, TableTeacher, Teacher, as_teacher, trained
from minikd.teachers.estimators import class_ids

N, K, C = 40, 6, 4
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, K)).astype(np.float32)
Y = np.arange(N) % C
X[np.arange(N), Y] += 3  # so that something can be learned
X.flags.writeable = False
ROWS = np.arange(N)
SCORES = (3 * RNG.normal(size=(N, C))).astype(np.float32)
WEIGHTS = RNG.normal(size=(K, C)).astype(np.float32)


def library(name: str) -> Any:
    """An optional library, or a skip that says what is needed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"needs {name}: pip install 'minikd[test-teachers]'")


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# --- one of each kind ---


class Linear:
    """An estimator of the simplest kind, with the methods that it is given."""

    def __init__(self, seed: int, classes: Any = range(C)) -> None:
        self.w = np.random.default_rng(seed).normal(size=(K, len(classes)))
        self.classes_ = np.array(list(classes))


class Proba(Linear):
    def predict_proba(self, x: Any) -> np.ndarray:
        return softmax(x @ self.w)


class Margin(Linear):
    def decision_function(self, x: Any) -> np.ndarray:
        return x @ self.w


class Labels(Linear):
    def predict(self, x: Any) -> np.ndarray:
        return self.classes_[(x @ self.w).argmax(axis=1)]


def times_weights(x: Any) -> np.ndarray:
    return np.asarray(x @ WEIGHTS)


def plus_one(x: Any) -> np.ndarray:
    return np.asarray(x @ WEIGHTS + np.arange(C))


def forest(seed: int) -> Any:
    library("sklearn")
    return trained("rf", X, Y, C, seed)


def sklearn_linear(seed: int) -> Any:
    model = library("sklearn.linear_model").RidgeClassifier(alpha=1.0 + seed)
    return as_teacher(model.fit(X, Y))


def lightgbm(seed: int) -> Any:
    kind = library("lightgbm").LGBMClassifier
    model = kind(n_estimators=3 + seed, min_child_samples=2, verbose=-1, n_jobs=1)
    return as_teacher(model.fit(X, Y))


def torch_net(seed: int) -> Any:
    torch = library("torch")
    torch.manual_seed(seed)
    nn = torch.nn
    return nn.Sequential(nn.Linear(K, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, C))


def onnx_model(
    seed: int, batch: Any = "n", name: str = "logits", last: str = "Identity", shape: tuple[Any, ...] = (K,)
) -> Any:
    """x → Flatten → Gemm → `last`, as an onnx ModelProto."""
    onnx = library("onnx")
    h = onnx.helper
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(K, C)).astype(np.float32), rng.normal(size=C).astype(np.float32)
    nodes = [
        h.make_node("Flatten", ["x"], ["flat"]),
        h.make_node("Gemm", ["flat", "w", "b"], ["z"]),
        h.make_node(last, ["z"], [name]),
    ]
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *shape])],
        [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, C])],
        [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(b, "b")],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8)


def onnx_teacher(seed: int = 0, *, gives: str | None = None, **how: Any) -> Any:
    library("onnxruntime")
    return kd.teachers.OnnxTeacher(onnx_model(seed, **how).SerializeToString(), gives=gives)


def model(seed: int) -> Any:
    net = kd.nn.MLP([K, 5, C], dropout=0.3, seed=seed)
    net.normalisation = kd.data.Normalisation(np.full(K, 2, np.float32), np.full(K, 3, np.float32))
    return net


class Case(NamedTuple):
    """How to make a teacher from a seed, and what it promises."""

    make: Callable[[int], Any]
    gives: str = "logits"


CASES = {
    "minikd": Case(model),
    "function": Case(lambda seed: plus_one if seed else times_weights),
    "predict_proba": Case(Proba, "probabilities"),
    "decision_function": Case(Margin),
    "predict": Case(Labels, "probabilities"),
    "random forest": Case(forest, "probabilities"),
    "ridge": Case(sklearn_linear),
    "lightgbm": Case(lightgbm, "probabilities"),
    "torch": Case(torch_net),
    "onnx": Case(onnx_teacher),
    "onnx probabilities": Case(lambda s: onnx_teacher(s, name="probabilities", last="Softmax"), "probabilities"),
    "table": Case(lambda seed: TableTeacher(SCORES + seed)),
    "log-probabilities": Case(lambda s: TableTeacher(np.log(softmax(SCORES * (s + 1))), gives="log_probabilities")),
    "hard labels": Case(lambda seed: HardLabels((Y + seed) % C, C), "probabilities"),
    "ensemble": Case(
        lambda s: Ensemble([as_teacher(Proba(s)), as_teacher(model(s))], average="probabilities"), "probabilities"
    ),
    "ensemble of logits": Case(
        lambda s: Ensemble([as_teacher(Margin(s)), TableTeacher(SCORES)], [1, 2], average="logits")
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_every_teacher_gives_logits_of_the_asked_rows(case: Case) -> None:
    teacher = as_teacher(case.make(0), classes=C)
    before = X.copy()
    z = teacher.logits(X, ROWS)
    assert z.shape == (N, C)
    assert z.dtype in (np.float32, np.float64)
    assert z.flags.c_contiguous
    assert teacher.gives == case.gives
    assert teacher.classes == C
    assert teacher.knows(ROWS)
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(teacher(X, ROWS), z)  # the same again
    np.testing.assert_allclose(teacher.logits(X[7:9], ROWS[7:9]), z[7:9], rtol=1e-4, atol=1e-5)  # no row minds others
    assert teacher.logits(X[:0], ROWS[:0]).shape == (0, C)


def test_every_teacher_softens_at_any_temperature(case: Case) -> None:
    teacher = as_teacher(case.make(0))
    z = teacher.logits(X, ROWS).astype(np.float64)
    for t in (0.5, 1.0, 20.0):
        p = teacher.probabilities(X, ROWS, temperature=t)
        np.testing.assert_allclose(p, softmax(z / t), atol=1e-6)
        assert (p[np.isneginf(z)] == 0).all()


def test_every_teacher_has_an_identity_that_follows_its_weights_and_a_copy(case: Case) -> None:
    made = case.make(0)
    teacher, other = as_teacher(made), as_teacher(case.make(1))
    name = teacher.identity
    teacher.logits(X, ROWS)
    assert teacher.identity == name  # being asked changes nothing
    assert as_teacher(case.make(0)).identity == name
    assert other.identity != name
    copy = pickle.loads(pickle.dumps(teacher))
    assert copy.identity == name
    np.testing.assert_array_equal(copy.logits(X, ROWS), teacher.logits(X, ROWS))


def test_an_identity_is_the_same_in_another_process() -> None:
    program = """
import numpy as np, minikd as kd
def double(x, w=np.arange(3.0)): return 2 * x * w
net = kd.nn.MLP([3, 2, 2], seed=1)
many = [kd.as_teacher(t) for t in (net, double, kd.teachers.HardLabels([0, 1], 2))]
print(*(t.identity for t in many), sep="|")
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": ".", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(kd.__file__).parent.parent,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].count(":") == 3


# --- the first batch and the later ones ---


@pytest.mark.parametrize(
    ("answer", "gives", "error", "words"),
    [
        (lambda x: x[:, 0], "logits", ShapeError, "shape"),
        (lambda x: x[:3], "logits", ShapeError, r"of shape \(40, classes\)"),
        (lambda x: np.where(np.arange(K) == 2, np.nan, x), "logits", ArgumentError, "row 0"),
        (lambda x: np.where(np.arange(K) == 2, np.inf, x), "logits", ArgumentError, "finite"),
        (lambda x: np.full((N, C), -np.inf), "logits", ArgumentError, "finite"),
        (lambda x: x, "probabilities", ArgumentError, "gives='logits'"),
        (lambda x: np.full((N, C), 0.3), "probabilities", ArgumentError, "sum to 1"),
    ],
)
def test_a_wrong_answer_is_refused_in_words(answer: Any, gives: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_teacher(answer, gives=gives).logits(X)


def test_another_number_of_classes_is_refused_at_once_and_later() -> None:
    with pytest.raises(ShapeError, match="of 7 classes, got 4 columns"):
        as_teacher(times_weights, classes=7).logits(X)
    teacher = as_teacher(lambda x: np.ones((len(x), len(x))))
    teacher.logits(X[:3])
    with pytest.raises(ShapeError, match="of 3 classes"):
        teacher.logits(X[:5])


def test_logits_that_look_like_probabilities_are_warned_of_once() -> None:
    teacher = as_teacher(lambda x: softmax(x @ WEIGHTS))
    with pytest.warns(UserWarning, match="look like probabilities where logits are expected"):
        teacher.logits(X)
    teacher.logits(X)


def test_probabilities_keep_exact_zeros_as_minus_infinity() -> None:
    p = np.tile([0.25, 0.75, 0.0], (N, 1))
    z = as_teacher(lambda x: p, gives="probabilities").logits(X)
    assert np.isneginf(z[:, 2]).all()
    np.testing.assert_allclose(z[:, :2], np.log(p[:, :2]))


def test_a_single_row_of_features_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x\[None\]"):
        as_teacher(times_weights).logits(X[0])


# --- functions and models of our own ---


def test_a_network_sees_raw_features_without_dropout() -> None:
    net = model(0)
    z = as_teacher(net).logits(X)
    np.testing.assert_array_equal(z, net.logits(X))
    np.testing.assert_array_equal(z, as_teacher(net).logits(X))


def test_a_network_that_learns_on_or_is_scaled_otherwise_is_another_teacher() -> None:
    net = model(0)
    teacher = as_teacher(net)
    seen = {teacher.identity}
    with kd.no_grad():
        net.parameters()[0][...] = net.parameters()[0].numpy() + 1
    seen.add(teacher.identity)
    net.normalisation = None
    seen.add(teacher.identity)
    assert len(seen) == 3


def test_a_saved_network_is_a_teacher(tmp_path: Path) -> None:
    net = model(0)
    kd.save(tmp_path / "m.safetensors", net)
    teacher = as_teacher(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(teacher.logits(X), net.logits(X))
    assert teacher.identity == as_teacher(net).identity


def test_what_a_function_closes_over_is_part_of_its_identity() -> None:
    def make(w: Any) -> Callable[..., Any]:
        return lambda x: x * w

    assert as_teacher(make(1.0)).identity == as_teacher(make(1.0)).identity
    assert as_teacher(make(1.0)).identity != as_teacher(make(2.0)).identity
    assert as_teacher(make(1.0), identity="mine").identity == "mine"


# --- estimators ---


def test_classes_are_put_in_order_by_id_and_unseen_ones_get_no_probability() -> None:
    estimator = Proba(0, [3, 0])
    p = estimator.predict_proba(X)
    z = as_teacher(estimator, classes=4).logits(X)
    np.testing.assert_allclose(np.exp(z), np.stack([p[:, 1], 0 * p[:, 0], 0 * p[:, 0], p[:, 0]], axis=1))
    assert np.isneginf(z[:, 1:3]).all()


def test_classes_are_looked_up_by_name() -> None:
    estimator = Margin(0, ["wolf", "cat"])
    teacher = as_teacher(estimator, class_names=["cat", "dog", "wolf"])
    z = teacher.logits(X)
    np.testing.assert_allclose(z[:, [2, 0]], estimator.decision_function(X))
    assert np.isneginf(z[:, 1]).all()


@given(st.permutations(range(6)), st.integers(1, 6))
def test_any_order_of_ids_or_names_is_undone(order: list[int], count: int) -> None:
    names = [f"n{k}" for k in range(6)]
    labels = order[:count]
    assert class_ids(np.array(labels), None, 6).tolist() == labels
    assert class_ids(np.array([names[k] for k in labels]), names, 6).tolist() == labels


def test_numbers_that_are_no_ids_may_be_names_but_never_both() -> None:
    assert class_ids(np.array([7, 3]), ["3", "7"], 2).tolist() == [1, 0]
    assert class_ids(np.array([0.0, 1.0]), ["3", "7"], 2).tolist() == [0, 1]
    assert class_ids(np.array([True, False]), None, 2).tolist() == [1, 0]
    with pytest.raises(ArgumentError, match="either ids or names"):
        class_ids(np.array([1, 2]), ["1", "2", "3"], 3)


@pytest.mark.parametrize("labels", [["a", "b"], [-1, 0], [0, 9], [1, 1], [0.5, 1.0], []])
def test_labels_that_are_no_classes_are_refused(labels: list[Any]) -> None:
    with pytest.raises(ArgumentError, match="class ids from 0 to 2"):
        class_ids(np.array(labels), None, 3)


def test_two_classes_in_one_column_are_widened() -> None:
    d = X[:, 0].astype(np.float64)
    p = 1 / (1 + np.exp(-d))
    margins = as_teacher(SimpleNamespace(decision_function=lambda x: d, classes_=np.array([0, 1])), identity="d")
    np.testing.assert_allclose(margins.logits(X), np.stack([0 * d, d], axis=1))
    np.testing.assert_allclose(margins.probabilities(X)[:, 1], p)
    for one in (p, p[:, None]):
        shares = as_teacher(SimpleNamespace(predict_proba=lambda x, one=one: one), identity="p")
        np.testing.assert_allclose(np.exp(shares.logits(X))[:, 1], p)


def test_an_estimator_with_labels_alone_gives_zero_and_one() -> None:
    p = as_teacher(Labels(0)).probabilities(X, temperature=3.0)
    assert set(np.unique(p)) == {0, 1}
    np.testing.assert_array_equal(p.argmax(axis=1), Labels(0).predict(X))
    with pytest.raises(ArgumentError, match="classes="):
        as_teacher(SimpleNamespace(predict=lambda x: Y)).logits(X)


def test_the_method_follows_what_is_to_be_given() -> None:
    class Both(Proba, Margin):
        pass

    assert as_teacher(Both(0)).gives == "probabilities"
    np.testing.assert_allclose(as_teacher(Both(0), gives="logits").logits(X), Both(0).decision_function(X))
    with pytest.raises(ArgumentError, match="an estimator that gives logits, got one with predict_proba"):
        as_teacher(Proba(0), gives="logits")


def test_pairwise_margins_and_several_outputs_are_refused() -> None:
    pairs = SimpleNamespace(decision_function=lambda x: x, classes_=np.arange(4))
    with pytest.raises(ShapeError, match="decision_function_shape='ovr'"):
        as_teacher(pairs).logits(X)
    with pytest.raises(ArgumentError, match="2 lists"):
        as_teacher(SimpleNamespace(predict_proba=lambda x: x, classes_=[np.arange(2), np.arange(2)]))


def test_an_estimator_that_cannot_be_pickled_needs_a_name() -> None:
    with pytest.raises(ArgumentError, match="identity="):
        _ = as_teacher(SimpleNamespace(predict_proba=lambda x: x)).identity


@pytest.mark.parametrize("name", ["rf", "gbt", "mlp"])
def test_a_teacher_trained_on_the_spot_learns_from_labelled_rows_alone(name: str) -> None:
    library("sklearn")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 5)) + 4 * np.eye(5)[y]
    labels = np.where(np.arange(300) < 250, y, -1)
    teacher = trained(name, x, labels, 4, seed=1)
    z = teacher.logits(x)
    assert (z.argmax(axis=1) == y)[250:].mean() > 0.9
    assert np.isneginf(z[:, 3]).all()  # a class without a label
    np.testing.assert_array_equal(trained(name, x, labels, 4, seed=1).logits(x), z)


def test_training_a_teacher_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(ArgumentError, match="one of rf, gbt, mlp"):
        trained("svm", X, Y, C)
    with pytest.raises(ArgumentError, match="at least two classes"):
        trained("rf", X, np.zeros(N, int), C)
    with pytest.raises(ArgumentError, match="trained first"):
        as_teacher("rf")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(BackendError, match=r"pip install 'minikd\[teachers\]'"):
        trained("rf", X, Y, C)


# --- PyTorch ---


@pytest.mark.parametrize("fails", [False, True])
def test_a_torch_network_is_left_in_the_modes_it_was_in(fails: bool) -> None:
    torch = library("torch")
    net = torch_net(0)
    net.train()
    net[1].eval()
    seen = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.append((module.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("on purpose")

    net[3].register_forward_hook(hook)
    modes = [m.training for m in net.modules()]
    teacher = as_teacher(net)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            teacher.logits(X)
    else:
        teacher.logits(X)
    assert seen == [(False, False)]
    assert [m.training for m in net.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_torch_network_gets_rows_of_its_shape_in_its_dtype() -> None:
    torch = library("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.Flatten(), torch.nn.Linear(4, C)).double()
    z = as_teacher(net, shape=(1, 2, 3)).logits(X)
    assert z.dtype == np.float64
    with torch.no_grad():
        np.testing.assert_allclose(z, net(torch.tensor(X.reshape(N, 1, 2, 3)).double()).numpy())
    with pytest.raises(ShapeError, match=r"rows of shape \(1, 5\)"):
        as_teacher(net, shape=(1, 5)).logits(X)


def test_a_torch_network_in_half_precision_or_with_a_record_as_output_is_understood() -> None:
    torch = library("torch")

    class Record(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return SimpleNamespace(logits=x[:, :C].bfloat16())

    assert as_teacher(Record()).logits(X).dtype == np.float32
    assert as_teacher(torch_net(0).bfloat16()).identity != as_teacher(torch_net(0)).identity

    class Pair(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x, x

    with pytest.raises(ArgumentError, match="one tensor of scores, got tuple"):
        as_teacher(Pair()).logits(X)


# --- ONNX ---


def test_an_onnx_file_is_read_from_its_bytes(tmp_path: Path) -> None:
    library("onnxruntime")
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_model(0).SerializeToString())
    teacher = as_teacher(str(path))
    z = teacher.logits(X)
    path.unlink()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(teacher)).logits(X), z)
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(K, C)), rng.normal(size=C)
    np.testing.assert_allclose(z, X @ w + b, rtol=1e-4, atol=1e-4)


def _asked_in_child(teacher: Teacher, pipe: Any) -> None:
    pipe.send(teacher.logits(X))


def test_an_onnx_teacher_works_in_a_forked_child() -> None:
    teacher = onnx_teacher()
    z = teacher.logits(X)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is what is tested
        child = context.Process(target=_asked_in_child, args=(teacher, there))
        child.start()
    assert here.poll(60)
    np.testing.assert_array_equal(here.recv(), z)
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("batch", [1, 7])
def test_an_onnx_model_for_a_fixed_number_of_rows_is_called_in_pieces(batch: int) -> None:
    np.testing.assert_allclose(onnx_teacher(batch=batch).logits(X), onnx_teacher().logits(X), rtol=1e-5, atol=1e-6)


def test_rows_are_arranged_as_an_onnx_input_asks() -> None:
    np.testing.assert_array_equal(onnx_teacher(shape=(1, 2, 3)).logits(X), onnx_teacher().logits(X))
    with pytest.raises(ShapeError, match=r"rows of shape \(1, 2, 3\)"):
        onnx_teacher(shape=(1, 2, 3)).logits(X[:, :4])


def test_what_an_onnx_output_gives_is_told_named_or_seen() -> None:
    assert onnx_teacher(name="output_probability", last="Softmax").gives == "probabilities"
    teacher = onnx_teacher(name="y", last="Softmax")
    with pytest.warns(UserWarning, match="taken for probabilities"):
        z = teacher.logits(X)
    assert teacher.gives == "probabilities"
    told = onnx_teacher(name="y", last="Softmax", gives="probabilities")
    np.testing.assert_array_equal(told.logits(X), z)
    np.testing.assert_allclose(onnx_teacher(name="y", last="LogSoftmax").logits(X), z, rtol=1e-4, atol=1e-5)
    assert told.identity != teacher.identity  # of the same bytes, other answers


def test_weights_outside_of_an_onnx_file_are_refused(tmp_path: Path) -> None:
    onnx = library("onnx")
    library("onnxruntime")
    path = tmp_path / "m.onnx"
    options = {"all_tensors_to_one_file": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx_model(0), str(path), save_as_external_data=True, **options)
    assert (tmp_path / "weights.bin").exists()
    with pytest.raises(ModelFormatError, match="external data"):
        as_teacher(path)


def test_external_weights_are_found_in_any_part_of_a_model() -> None:
    onnx = library("onnx")
    for place in ("sparse", "attribute", "branch", "function"):
        tensor = onnx.TensorProto(name="t", data_location=onnx.TensorProto.EXTERNAL)
        proto = onnx.ModelProto()
        if place == "sparse":
            proto.graph.sparse_initializer.add().values.CopyFrom(tensor)
        elif place == "attribute":
            proto.graph.node.add().attribute.add().t.CopyFrom(tensor)
        elif place == "branch":
            proto.graph.node.add().attribute.add().g.initializer.append(tensor)
        else:
            proto.functions.add().node.add().attribute.add().tensors.append(tensor)
        with pytest.raises(ModelFormatError, match="external data"):
            kd.teachers.OnnxTeacher(proto.SerializeToString())


@given(st.binary(max_size=60))
def test_bytes_that_are_no_onnx_model_are_refused(content: bytes) -> None:
    library("onnxruntime")
    with pytest.raises((ModelFormatError, ArgumentError)):
        kd.teachers.OnnxTeacher(content)


def test_an_onnx_output_of_maps_is_refused_with_the_way_out() -> None:
    onnx = library("onnx")
    library("onnxruntime")
    proto = onnx_model(0)
    zipmap = onnx.helper.make_node("ZipMap", ["logits"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=range(C))
    proto.graph.node.append(zipmap)
    del proto.graph.output[:]
    value = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [])
    kind = onnx.helper.make_sequence_type_proto(onnx.helper.make_map_type_proto(onnx.TensorProto.INT64, value))
    proto.graph.output.append(onnx.helper.make_value_info("maps", kind))
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    with pytest.raises(ArgumentError, match="zipmap=False"):
        kd.teachers.OnnxTeacher(proto.SerializeToString())


# --- tables ---


def _save(path: Path, key: str, table: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, table)
    elif path.suffix == ".npz":
        np.savez(path, **{key: table})
    elif path.suffix == ".safetensors":
        kd.export.write_tensors(path, {key: table}, {})
    else:
        np.savetxt(path, table, delimiter=",", header="a,b,c,d", comments="", fmt="%.9g")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".csv"])
@pytest.mark.parametrize("holds", ["logits", "log_probabilities", "probabilities"])
def test_a_file_answers_by_sample_number(suffix: str, holds: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    table = {"logits": SCORES, "log_probabilities": np.log(softmax(SCORES)), "probabilities": softmax(SCORES)}[holds]
    _save(path, holds, table)
    told = None if suffix in (".npz", ".safetensors") else holds
    teacher = as_teacher(path, gives=told, classes=C)
    rows = np.array([5, 0, 5])
    assert teacher.per_row
    np.testing.assert_allclose(teacher.probabilities(None, rows), softmax(SCORES)[rows], atol=1e-6)
    assert teacher.knows(rows)
    assert not teacher.knows([N])
    assert not teacher.knows([-1])
    with pytest.raises(ArgumentError, match=f"samples that it holds, got {N}"):
        teacher.logits(None, [0, N])
    with pytest.raises(ArgumentError, match="sample"):
        teacher.logits(X)
    assert teacher.identity == as_teacher(path, gives=told).identity
    _save(path, holds, table[::-1])
    assert teacher.identity != as_teacher(path, gives=told).identity


def test_an_npy_file_is_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", SCORES)
    assert isinstance(as_teacher(tmp_path / "t.npy").table, np.memmap)


def test_a_tables_nan_is_refused_with_its_sample_number(tmp_path: Path) -> None:
    table = SCORES.copy()
    table[17, 2] = np.nan
    np.save(tmp_path / "t.npy", table)
    with pytest.raises(ArgumentError, match="the answer for sample 17"):
        as_teacher(tmp_path / "t.npy").logits(None, [3, 17])
    with pytest.raises(ArgumentError, match="log-probabilities, whose exp sums to 1"):
        TableTeacher(SCORES, gives="log_probabilities").logits(None, [0])


def test_a_table_of_probabilities_that_are_called_logits_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="look like probabilities"):
        TableTeacher(softmax(SCORES)).logits(None, ROWS)


def test_columns_of_a_csv_file_are_put_in_order_by_name(tmp_path: Path) -> None:
    _save(tmp_path / "t.csv", "", SCORES)
    z = as_teacher(tmp_path / "t.csv", class_names=["d", "a", "c", "b"]).logits(None, ROWS)
    np.testing.assert_allclose(z, SCORES[:, [3, 0, 2, 1]], rtol=1e-6)
    with pytest.raises(DataError, match="the columns a, b, c, d"):
        as_teacher(tmp_path / "t.csv", class_names=["d", "a", "c", "x"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.npy", b"nonsense", "np.save"),
        ("t.npz", b"nonsense", "np.savez"),
        ("t.csv", b"a,b\n1,x\n", "could not convert"),
        ("t.csv", b"a,b\n1,2,3\n", "2 names over numbers"),
        ("t.csv", b"a,a\n1,2\n", "Name each class once"),
        ("t.csv", b"", "not enough values"),
    ],
)
def test_a_damaged_table_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        as_teacher(tmp_path / name)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    for name, save in (("t.npy", np.save), ("t.npz", np.savez)):
        save(tmp_path / name, np.array([[1, "x"]], object), allow_pickle=True)
        with pytest.raises(DataError, match=r"Python objects|allow_pickle=False"):
            as_teacher(tmp_path / name, allow_pickle=True)


def test_an_archive_says_which_array_it_means(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", logits=SCORES, probabilities=softmax(SCORES))
    np.testing.assert_array_equal(as_teacher(tmp_path / "t.npz").logits(None, ROWS), SCORES)
    assert as_teacher(tmp_path / "t.npz", gives="probabilities").gives == "probabilities"
    np.savez(tmp_path / "u.npz", a=SCORES, b=SCORES)
    with pytest.raises(DataError, match="the arrays a, b"):
        as_teacher(tmp_path / "u.npz")


def test_hard_labels_refuse_rows_without_one() -> None:
    teacher = HardLabels([2, -1, 0], 3)
    np.testing.assert_array_equal(teacher.probabilities(None, [2, 0]), [[1, 0, 0], [0, 0, 1]])
    assert teacher.knows([0, 2])
    assert not teacher.knows([1])
    assert not teacher.knows([3])
    with pytest.raises(ArgumentError, match="rows without a label"):
        teacher.logits(None, [0, 1])
    with pytest.raises(ArgumentError, match="from 0 to 2, or -1"):
        HardLabels([3], 3)


def test_a_folder_with_a_manifest_is_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    store = SimpleNamespace(
        logits=lambda x, rows: SCORES[rows], knows=lambda rows: (rows < N).all(), classes=C, identity="who"
    )
    monkeypatch.setitem(sys.modules, "minikd.store", SimpleNamespace(open=lambda path: store))
    teacher = as_teacher(tmp_path, classes=C)
    assert isinstance(teacher, StoreTeacher)
    assert teacher.identity == "who"
    np.testing.assert_array_equal(teacher.logits(None, [3, 1]), SCORES[[3, 1]])
    assert not teacher.knows([N])
    with pytest.raises(ShapeError, match="of 9 classes"):
        as_teacher(tmp_path, classes=9)


# --- several, pickles, and what is nothing ---


def test_the_two_averages_are_what_they_say() -> None:
    a, b, w = SCORES, SCORES[::-1].copy(), np.array([1, 3])
    both = [TableTeacher(a), TableTeacher(b)]
    p = Ensemble(both, w, "probabilities").probabilities(None, ROWS)
    np.testing.assert_allclose(p, 0.25 * softmax(a) + 0.75 * softmax(b), atol=1e-6)
    z = Ensemble(both, w, "logits").logits(None, ROWS)
    np.testing.assert_allclose(z, 0.25 * a + 0.75 * b, atol=1e-6)
    assert z.dtype == Ensemble(both, w, "logits")(None, ROWS).dtype == np.float32


def test_a_veto_counts_in_logits_and_is_outvoted_in_probabilities() -> None:
    both = [HardLabels([0], 3), TableTeacher(np.array([[1.0, 1.0, 2.0]]))]
    assert np.isneginf(Ensemble(both, average="logits").logits(None, [0])[0, 1:]).all()
    assert (Ensemble(both, average="probabilities").probabilities(None, [0]) > 0).all()


def test_a_list_of_teachers_needs_its_average_named() -> None:
    with pytest.raises(ArgumentError, match="They differ"):
        as_teacher([times_weights, plus_one])
    teacher = as_teacher([times_weights, Proba(0)], average="probabilities", weights=[2, 1])
    assert teacher.logits(X).shape == (N, C)
    for weights in ([1], [1, 0], [1, np.nan]):
        with pytest.raises(ArgumentError, match="2 numbers above 0"):
            as_teacher([times_weights, plus_one], average="logits", weights=weights)
    with pytest.raises(ShapeError, match="of the same classes"):
        as_teacher([times_weights, lambda x: x], average="logits").logits(X)


@pytest.mark.parametrize("name", ["m.pkl", "m.joblib"])
def test_a_pickle_is_read_only_with_leave(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("joblib"):
        library("joblib").dump(Proba(0), path)
    else:
        path.write_bytes(pickle.dumps(Proba(0)))
    with pytest.raises(ArgumentError, match="allow_pickle=True"):
        as_teacher(path)
    teacher = as_teacher(path, allow_pickle=True)
    np.testing.assert_allclose(teacher.probabilities(X), Proba(0).predict_proba(X))
    assert teacher.identity.startswith("file:")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a pickled model"):
        as_teacher(path, allow_pickle=True)


def test_a_teacher_stays_itself() -> None:
    teacher = as_teacher(times_weights)
    assert as_teacher(teacher, classes=C) is teacher
    with pytest.raises(ArgumentError, match="a teacher of 9 classes"):
        as_teacher(teacher, classes=9)


def test_what_cannot_teach_is_refused_with_what_could(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"got builtins\.int"):
        as_teacher(3)
    with pytest.raises(ArgumentError, match="which does not exist"):
        as_teacher(tmp_path / "m.onnx")
    with pytest.raises(ArgumentError, match=r"ends in \.onnx"):
        as_teacher(Path(__file__))
    with pytest.raises(ArgumentError, match="output must be left out for a function"):
        as_teacher(times_weights, output="y")
    with pytest.raises(ArgumentError, match="'logits' or 'probabilities'"):
        as_teacher(times_weights, gives="scores")


def test_as_teacher_loads_no_library_that_is_not_needed() -> None:
    program = "import sys, minikd as kd; kd.as_teacher(kd.nn.MLP([2, 2])); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(kd.__file__).parent.parent
    ).stdout.split()
    assert "minikd.teachers" in found
    assert not {"torch", "sklearn", "onnxruntime", "onnx", "joblib"} & set(found)


# --- what is refused, in words ---


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Ensemble([], average="logits"), ArgumentError, "teachers must be one teacher at least, got none"),
        (lambda: TableTeacher(SCORES, gives="scores"), ArgumentError, "gives must be one of logits, .* got 'scores'"),
        (lambda: TableTeacher(SCORES[0]), ShapeError, r"numbers of shape \(samples, classes\), got float32 of shape"),
        (lambda: as_teacher(SCORES, classes=3, class_names=list("abcd")), ArgumentError, "classes must be 4, as class"),
        (
            lambda: as_teacher(named("abcd"), class_names=list("abdc")),
            ArgumentError,
            "the classes a, b, d, c, got a, b",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def named(names: str) -> kd.nn.MLP:
    """A network whose classes have these letters as names."""
    model = kd.nn.MLP((K, len(names)))
    model.class_names = tuple(names)
    return model


def test_an_estimator_without_a_content_needs_an_identity_of_the_users() -> None:
    model = Margin(0)
    vars(model)["cannot_be_pickled"] = lambda: None
    with pytest.raises(ArgumentError, match="a model that can be pickled, which its identity needs"):
        _ = as_teacher(model).identity
    assert as_teacher(model, identity="mine").identity == "mine"


def test_without_joblib_an_estimators_content_is_still_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *_: Any, **__: Any) -> Any:
        raise BackendError("as_teacher", name, expected="installed", got="none")

    monkeypatch.setattr("minikd.teachers.estimators.library", absent)
    first, same, other = (as_teacher(Margin(seed)).identity for seed in (0, 0, 1))
    assert first == same
    assert first != other


def test_a_models_file_says_itself_what_it_gives(tmp_path: Path) -> None:
    kd.save(tmp_path / "m.safetensors", named("abcd"))
    with pytest.raises(ArgumentError, match="gives must be left out for a model of minikd, got 'probabilities'"):
        as_teacher(tmp_path / "m.safetensors", gives="probabilities")


def test_the_only_array_of_an_archive_is_the_table_whatever_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", whatever=SCORES)
    np.testing.assert_array_equal(as_teacher(tmp_path / "t.npz", gives="logits").logits(None, ROWS), SCORES)


def test_functions_within_functions_and_sets_are_part_of_what_a_function_is() -> None:
    def made(factor: float) -> Callable[[Any], Any]:
        def scores(x: Any) -> Any:
            if factor in {1.0, 2.0}:
                return (lambda z: z @ WEIGHTS)(x) * factor
            return x @ WEIGHTS

        return scores

    first, same, other = (as_teacher(made(factor), classes=C).identity for factor in (1.0, 1.0, 2.0))
    assert first == same
    assert first != other


def test_an_onnx_model_that_cannot_be_a_teacher_is_refused_in_words(tmp_path: Path) -> None:
    onnx = library("onnx")
    library("onnxruntime")
    with pytest.raises(ModelFormatError, match="a readable file"):
        kd.teachers.OnnxTeacher(tmp_path)
    two = onnx_model(0)
    two.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [None, 1]))
    with pytest.raises(ModelFormatError, match="a model with one input, got x, mask"):
        kd.teachers.OnnxTeacher(two.SerializeToString()).logits(X)
    words = onnx_model(0)
    del words.graph.node[:], words.graph.initializer[:]
    words.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    words.graph.node.append(onnx.helper.make_node("Identity", ["x"], ["unused"]))
    scores = onnx.numpy_helper.from_array(SCORES, "scores")
    words.graph.node.append(onnx.helper.make_node("Constant", [], [words.graph.output[0].name], value=scores))
    with pytest.raises(ModelFormatError, match=r"a model whose input is one of .*float.*, got tensor\(string\)"):
        kd.teachers.OnnxTeacher(words.SerializeToString()).logits(X)


def test_the_output_of_an_onnx_model_can_be_named() -> None:
    library("onnxruntime")
    content = onnx_model(0).SerializeToString()
    name = kd.teachers.OnnxTeacher(content).output
    chosen = kd.teachers.OnnxTeacher(content, output=name)
    np.testing.assert_array_equal(chosen.logits(X), kd.teachers.OnnxTeacher(content).logits(X))
