"""The choice of a backend, what is said of each, and what is refused before a kernel sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import kernels
from minikd.errors import ArgumentError, BackendError, DTypeError, MinikdError, ShapeError
from minikd.kernels import (
    BACKENDS,
    as_bytes,
    as_index,
    as_real,
    bind,
    composed,
    current_backend,
    kernel_names,
    prepare,
    run,
)
from minikd.ops import OPS
from minikd.ops.losses import one_hot

TUNED = ("MINIKD_CPU", "MINIKD_NUM_THREADS", "MINIKD_PRODUCTS")


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has computed nothing yet, and whose environment asks for nothing."""
    monkeypatch.setattr(kernels, "_in_use", [])
    for name in ("MINIKD_BACKEND", *TUNED):
        monkeypatch.delenv(name, raising=False)


# --- what there is ---


def test_a_kernel_has_its_operations_name_and_another_where_it_is_differentiable() -> None:
    names = kernel_names()
    assert len(set(names)) == len(names)
    assert set(names) == {*OPS, *(f"{name}_vjp" for name, op in OPS.items() if op.vjp)}


def test_what_is_said_of_a_backend_is_whether_it_runs_why_not_and_what_it_takes_from_numpy(backend: str) -> None:
    found = kd.backends()
    assert list(found) == list(BACKENDS)
    assert [name for name, status in found.items() if status.default] == [backend]
    for name, status in found.items():
        assert status.reason == BACKENDS[name].missing()
        assert status.available == (status.reason == "")
    assert found["numpy"].available
    assert found["numpy"].fallbacks == ()
    if backend != "numpy":
        own = {*__import__(BACKENDS[backend].module, fromlist=["NAMES"]).NAMES, *composed.KERNELS}
        assert found[backend].fallbacks == tuple(name for name in kernel_names() if name not in own)


@pytest.mark.parametrize("products", [{}, {"multiplier": None}])
def test_a_backend_that_multiplies_by_itself_takes_no_product_from_numpy(
    products: dict[str, None], monkeypatch: pytest.MonkeyPatch
) -> None:
    simple = SimpleNamespace(NAMES={"relu"}, unavailable=lambda: "", **products)
    monkeypatch.setitem(sys.modules, "minikd.kernels.simple", simple)
    monkeypatch.setitem(BACKENDS, "simple", kernels.Backend("minikd.kernels.simple", "", ""))
    fallbacks = kd.backends()["simple"].fallbacks
    assert "neg" in fallbacks
    assert not {"relu", *composed.KERNELS} & {*fallbacks}
    assert {*composed.PRODUCTS} & {*fallbacks} == (set() if products else {*composed.PRODUCTS})


def test_a_backend_whose_package_is_missing_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = kernels.Backend("minikd.kernels.no_such_module", "no_such_package", "numba")  # which is not imported
    monkeypatch.setitem(BACKENDS, "numba", absent)
    reason = "the package no_such_package is not installed: pip install 'minikd[numba]'"
    assert absent.missing() == reason
    status = kd.backends()["numba"]
    assert (status.available, status.reason, status.fallbacks) == (False, reason, ())
    usable = ", ".join(name for name in BACKENDS if not BACKENDS[name].missing())
    with pytest.raises(BackendError) as caught:
        kd.use_backend("numba")
    assert str(caught.value) == (
        f"use_backend: name must be a backend that runs here ({usable}), got 'numba'. Reason: {reason}."
    )


def test_an_unknown_backend_is_refused_with_the_names_of_the_known() -> None:
    with pytest.raises(BackendError) as caught:
        kd.use_backend("cuda")
    assert str(caught.value) == "use_backend: name must be one of c, numba, numpy, cupy, got 'cuda'."


# --- the first choice ---


@pytest.mark.usefixtures("nothing_chosen")
def test_without_a_wish_the_first_that_runs_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_backend() == next(name for name in BACKENDS if not BACKENDS[name].missing())
    monkeypatch.setattr(kernels, "_in_use", [])
    monkeypatch.setitem(BACKENDS, "c", kernels.Backend("minikd.kernels.native", "no_such_package", ""))
    monkeypatch.setitem(BACKENDS, "numba", kernels.Backend("minikd.kernels.jit", "no_such_package", ""))
    assert current_backend() == "numpy"


@pytest.mark.parametrize("ask", [kernels.in_use, lambda: kernels.execute(OPS["relu"], [np.ones(2)], {})])
@pytest.mark.usefixtures("nothing_chosen")
def test_whatever_is_asked_first_chooses(ask: Callable[[], Any]) -> None:
    ask()
    assert kernels.in_use().name == current_backend() == next(name for name in BACKENDS if not BACKENDS[name].missing())


@pytest.mark.usefixtures("nothing_chosen")
def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKD_BACKEND", "numpy")
    assert current_backend() == "numpy"


@pytest.mark.usefixtures("nothing_chosen")
def test_a_backend_that_the_environment_asks_for_in_vain_is_refused_and_none_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINIKD_BACKEND", "cuda")
    with pytest.raises(BackendError) as caught:
        current_backend()
    assert str(caught.value) == "the environment: MINIKD_BACKEND must be one of c, numba, numpy, cupy, got 'cuda'."
    assert not any(status.default for status in kd.backends().values())


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.usefixtures("nothing_chosen", "c_built")
def test_what_the_environment_asks_of_the_c_kernels_is_looked_at_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setitem(BACKENDS, "c", kernels.Backend("minikd.kernels.native", "no_such_package", ""))
    monkeypatch.setattr("minikd.kernels.native.heed_environment", lambda: asked.append(name))
    current_backend()
    assert asked == []
    monkeypatch.setattr(kernels, "_in_use", [])
    monkeypatch.setenv(name, "1")
    current_backend()
    assert asked == [name]


# --- what is refused ---

X, Y = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
READ_ONLY = Y.copy()
READ_ONLY.flags.writeable = False
REFUSED: dict[str, tuple[Callable[[], Any], type[MinikdError], str]] = {
    "a buffer too few": (lambda: bind("relu", Y), ShapeError, "relu: buffers must be y, u, got 1 buffers."),
    "no array": (lambda: bind("relu", Y, None), ShapeError, "relu: u must be an array, got None."),
    "another dtype": (
        lambda: bind("relu", Y, X.astype(np.float64)),
        DTypeError,
        "relu: u must be an array of float32, got float64.",
    ),
    "whole numbers": (
        lambda: bind("relu", Y.astype(int), X),
        DTypeError,
        "relu: y must be an array of float32, got int64.",
    ),
    "a result that cannot be written": (
        lambda: bind("relu", READ_ONLY, X),
        ShapeError,
        "relu: y must be writable, got a read-only array.",
    ),
    "a gradient that cannot be written": (
        lambda: bind("relu_vjp", READ_ONLY, X, Y, None),
        ShapeError,
        "relu: du must be writable, got a read-only array.",
    ),
    "a saved value that cannot be written": (
        lambda: bind("kl_div", np.zeros((), np.float32), READ_ONLY, X, X),
        ShapeError,
        "kl_div: gradient must be writable, got a read-only array.",
    ),
    "an update that cannot be written": (
        lambda: bind("sgd_step", READ_ONLY[0], None, X[0], np.float64(1)),
        ShapeError,
        "sgd_step: w must be writable, got a read-only array.",
    ),
    "columns": (
        lambda: bind("relu", Y, np.asfortranarray(X)),
        ShapeError,
        "relu: u must be C-contiguous, got strides (4, 8).",
    ),
    "an attribute that there is not": (
        lambda: run("kl_div", Y, X, size=3),
        ArgumentError,
        "kl_div: size must be one of the attributes reduction, log_target, got 3.",
    ),
    "an attribute where there are none": (
        lambda: bind("relu", Y, X, axis=3),
        ArgumentError,
        "relu: axis must be left out: there are no attributes, got 3.",
    ),
    "complex numbers as an input": (
        lambda: kernels.execute(OPS["relu"], [np.ones(2, complex)], {}),
        DTypeError,
        "relu: u must be an array of float16, float32, float64 or integers, got complex128. "
        "Convert it with .astype(float).",
    ),
    "complex numbers where no gradient is taken": (
        lambda: kernels.execute(OPS["argmax"], [np.ones((1, 2), complex)], {}),
        DTypeError,
        "argmax: x must be an array of float16, float32, float64 or integers, got complex128. "
        "Convert it with .astype(float).",
    ),
    "complex numbers": (
        lambda: as_real("f", "a", np.ones(2, complex)),
        DTypeError,
        "f: a must be an array of float16, float32, float64 or integers, got complex128. "
        "Convert it with .astype(float).",
    ),
    "fractions as class ids": (
        lambda: as_index("f", "a", X),
        DTypeError,
        "f: a must be an array of integers, got float32. Class ids are whole numbers; convert them with .astype(int).",
    ),
    "fractions as a counter": (
        lambda: prepare(OPS["dropout"], [X, np.array(0.5)]),
        DTypeError,
        "dropout: step must be an array of integers, got float64. "
        "Class ids are whole numbers; convert them with .astype(int).",
    ),
    "numbers as bytes": (
        lambda: as_bytes("f", "a", [1, 2]),
        DTypeError,
        "f: a must be an array of uint8, got int64.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_the_message_says_what_and_why(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


BEFORE_AND_BEHIND_THE_TEMPERATURE: dict[str, tuple[list[Any], int]] = {
    "reverse_kl": ([], 0),
    "jensen_shannon": ([], 1),
    "skewed_kl": ([], 1),
    "standardised_kl": ([], 0),
    "decoupled_kd": ([np.array([0, 1])], 2),
    "distillation_loss": ([None], 2),
}


@pytest.mark.parametrize("name", BEFORE_AND_BEHIND_THE_TEMPERATURE)
def test_a_temperature_of_0_is_refused_by_a_kernel_in_its_own_name(name: str, backend: str) -> None:
    target, weights = BEFORE_AND_BEHIND_THE_TEMPERATURE[name]
    with pytest.raises(ArgumentError, match=f"^{name}: temperature must be a finite number above 0"):
        kernels.execute(OPS[name], [X, X, *target, np.float64(0), *[np.float64(0.5)] * weights], {})


@pytest.mark.parametrize("name", ["cross_entropy", "decoupled_kd", "distillation_loss"])
def test_a_label_that_there_is_not_is_refused_by_a_kernel_in_its_own_name(name: str, backend: str) -> None:
    target, behind = np.array([0, 3]), [None] if name == "cross_entropy" else [np.float64(1)] * 3
    scores = [X] if name == "cross_entropy" else [X, X]
    with pytest.raises(MinikdError, match=f"^{name}: ") as caught:
        kernels.execute(OPS[name], [*scores, target, *behind], {})
    assert "3" in str(caught.value)


@pytest.mark.parametrize("kind", [np.float16, np.int32, np.uint8, bool, ">f4", ">f8", np.float32, np.float64])
@pytest.mark.parametrize("other", [np.float32, np.float64])
def test_numbers_become_real_ones_of_the_dtype_that_they_have_or_the_other(kind: Any, other: Any) -> None:
    value = np.ones(2, kind)
    found = as_real("f", "a", value, other)
    native = np.dtype(kind).newbyteorder("=")
    assert found.dtype == (native if native in (np.float32, np.float64) else other)
    np.testing.assert_array_equal(found, [1, 1])


def test_whole_numbers_beside_float64_keep_all_their_digits() -> None:
    large = 2**24 + 1  # which float32 does not hold
    (_, other), real = prepare(OPS["add"], [np.zeros((1, 1)), np.full((1, 1), large)])
    assert real == other.dtype == np.float64
    assert other.item() == large


def test_whole_numbers_beside_float32_are_rounded_once() -> None:
    number = 2**60 + 2**36 + 1  # a little above the middle of two floats; float64 would lose that little
    (_, other), _ = prepare(OPS["add"], [np.zeros((1, 1), np.float32), np.full((1, 1), number)])
    assert other.item() == 2**60 + 2**37


def test_an_operation_on_class_ids_alone_counts_as_one_on_float32() -> None:
    _, real = prepare(OPS["take_index"], [np.arange(3), np.arange(2)])
    assert real == np.float32


@pytest.mark.parametrize("number", [3, np.float32(3), np.array(3), 3.0])
def test_a_scalar_is_a_float_or_becomes_an_array_of_float64(number: Any) -> None:
    (_, factor), _ = prepare(OPS["scale"], [X, number])
    assert factor == 3
    assert type(factor) is float or (factor.dtype == np.float64 and factor.shape == ())
    assert prepare(OPS["scale"], [3.0, number])[0][0].dtype == np.float64  # a number where an array belongs becomes one


def test_a_number_that_int64_does_not_hold_stays_too_large() -> None:
    most = np.iinfo(np.int64).max
    found = as_index("f", "a", np.array([0, 5, 2**63, 2**64 - 1], np.uint64))
    assert found.dtype == np.int64
    assert found.tolist() == [0, 5, most, most]
    assert as_index("f", "a", np.array([-3, 4], np.int8)).tolist() == [-3, 4]


@pytest.mark.parametrize("ignored", [-100, 1])
def test_a_row_without_a_label_has_no_class_to_aim_at(ignored: int) -> None:
    target = np.array([2, ignored])
    found = one_hot(np, target, target != ignored, 4, 0.25)
    assert found.tolist() == [[0.0625, 0.0625, 0.8125, 0.0625], [0, 0, 0, 0]]


def test_an_operation_saves_for_backward_unless_it_is_told_not_to() -> None:
    inputs = [X, np.array([0, 1]), None]
    assert kernels.execute(OPS["cross_entropy"], inputs, {})[1][0].shape == X.shape
    assert kernels.evaluate(OPS["cross_entropy"], inputs, {})[1][0].shape == X.shape
    assert kernels.execute(OPS["cross_entropy"], inputs, {}, save=False)[1] == [None]


def test_buffers_that_look_like_those_before_are_launched_as_those(backend: str) -> None:
    first = kernels.in_use().launch("relu", (np.empty((7, 5)), np.ones((7, 5))), {})
    assert kernels.in_use().launch("relu", (np.empty((7, 5)), np.zeros((7, 5))), {}) is first
    assert kernels.in_use().launch("relu", (np.empty((5, 7)), np.zeros((5, 7))), {}) is not first


def test_a_kernels_launcher_is_made_once(backend: str) -> None:
    for name in ("relu", "scale", "cross_entropy"):
        assert kernels.in_use().launcher(name) is kernels.in_use().launcher(name)


def test_a_backend_needs_no_more_than_binders(monkeypatch: pytest.MonkeyPatch) -> None:
    def binder(name: str) -> Callable[..., Callable[[], None]]:
        return lambda *buffers, **attrs: lambda: np.copyto(buffers[0], {"relu": 7, "neg": 8}[name])

    simple = SimpleNamespace(NAMES={"relu", "neg"}, binder=binder)
    monkeypatch.setitem(sys.modules, "minikd.kernels.simple", simple)
    monkeypatch.setitem(BACKENDS, "simple", kernels.Backend("minikd.kernels.simple", "", ""))
    used = kernels._InUse("simple")
    y = np.empty(2)
    for name, wanted in (("relu", 7), ("neg", 8), ("exp", 1)):  # the last from the reference
        used.run(name, y, np.zeros(2))
        assert y.tolist() == [wanted, wanted]


@pytest.mark.parametrize("real", [None, np.dtype(np.float32)])
def test_inputs_that_look_like_those_before_are_not_prepared_again(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((7, 3), np.float32)
    kernels.execute(OPS["relu"], [x], {}, real=real)
    monkeypatch.setattr(kernels, "prepare", None)
    monkeypatch.setattr(kernels, "_learn", None)
    assert kernels.execute(OPS["relu"], [-x], {}, real=real)[0][0].tolist() == np.zeros((7, 3)).tolist()


def test_inputs_that_become_what_those_before_became_are_not_learned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((7, 4), int)
    kernels.execute(OPS["relu"], [x], {})
    monkeypatch.setattr(kernels, "_learn", None)
    assert kernels.execute(OPS["relu"], [-x], {})[0][0].tolist() == np.zeros((7, 4)).tolist()


def test_neighbours_become_one_call_where_the_backend_can_run_them_as_one(backend: str) -> None:
    x = np.array([-1.0, 2.0])
    y, z = np.empty(2), np.empty(2)
    calls = kernels.join([bind("scale", y, x, np.float64(2)), bind("scale", z, y, np.float64(3))])
    assert len(calls) == (1 if backend == "c" else 2)
    for call in calls:
        call()
    assert z.tolist() == [-6, 12]


def test_class_ids_of_the_right_kind_are_taken_as_they_are() -> None:
    ids = np.array([0, 2**60 + 1])
    assert as_index("f", "a", ids) is ids


def test_a_class_id_without_axes_gets_none() -> None:
    (_, rows), _ = prepare(OPS["take"], [X, np.array(1, np.int32)])
    assert rows.shape == ()
    assert rows.dtype == np.int64


def test_an_input_that_holds_no_numbers_is_refused_by_its_name_in_the_operation() -> None:
    with pytest.raises(DTypeError, match=r"^add: b must be"):
        prepare(OPS["add"], [np.zeros((1, 1)), np.array([["text"]])])
