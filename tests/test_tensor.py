"""Tensors: operators against NumPy, their gradients against differences, and what a tensor refuses."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, ShapeError, TapeError

each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def positive(shape: tuple[int, ...], seed: int, dtype: Any = np.float64) -> Any:
    """Numbers from 0.5 to 2, where every operator is smooth."""
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(dtype)


def difference(function: Callable[..., Any], values: list[Any], place: int, upstream: Any, step: float = 1e-6) -> Any:
    """The gradient of Σ upstream·function(values) with respect to one value, by central differences of NumPy's own."""
    gradient = np.zeros_like(values[place])
    for index in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = [v.copy() for v in values]
            moved[place][index] += sign * step
            ends.append((upstream * function(*moved)).sum())
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
UNARY: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "-": (operator.neg, np.negative),
    "abs()": (abs, np.abs),
    ".abs": (lambda t: t.abs(), np.abs),
    ".exp": (lambda t: t.exp(), np.exp),
    ".log": (lambda t: t.log(), np.log),
    ".relu": (lambda t: t.relu(), lambda x: np.maximum(x, 0)),
    ".tanh": (lambda t: t.tanh(), np.tanh),
    ".sigmoid": (lambda t: t.sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    ".sum": (lambda t: t.sum(), lambda x: x.sum()),
    ".sum axis": (lambda t: t.sum(axis=1, keepdims=True), lambda x: x.sum(axis=1, keepdims=True)),
    ".sum axes": (lambda t: t.sum(axis=(0, -1)), lambda x: x.sum(axis=(0, -1))),
    ".mean": (lambda t: t.mean(axis=0), lambda x: x.mean(axis=0)),
    ".max": (lambda t: t.max(axis=-1), lambda x: x.max(axis=-1)),
    ".reshape": (lambda t: t.reshape(6, -1), lambda x: x.reshape(6, -1)),
    ".reshape tuple": (lambda t: t.reshape((4, 3, 2)), lambda x: x.reshape((4, 3, 2))),
    ".T": (lambda t: t.T, lambda x: x.T),
    ".transpose": (lambda t: t.transpose(1, 2, 0), lambda x: x.transpose(1, 2, 0)),
    ".take": (lambda t: t.take([1, 0, 0]), lambda x: x[[1, 0, 0]]),
    "[rows]": (lambda t: t[[1, 0, 1]], lambda x: x[[1, 0, 1]]),
    "[slice]": (lambda t: t[::-1], lambda x: x[::-1]),
    "[mask]": (lambda t: t[np.array([False, True])], lambda x: x[np.array([False, True])]),
}


# --- values and gradients against NumPy ---


@pytest.mark.usefixtures("backend")
@each_float
@pytest.mark.parametrize("name", BINARY)
def test_an_operator_gives_numpys_value_and_the_gradient_of_both_sides(dtype: Any, name: str) -> None:
    function = BINARY[name]
    values = [positive((3, 4), 1), positive((3, 4), 2)]
    tensors = [kd.Tensor(v.astype(dtype), requires_grad=True) for v in values]
    y, upstream = function(*tensors), positive((3, 4), 3)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.numpy(), function(*values), rtol=1e-5 if dtype is np.float32 else 1e-14)
    y.backward(upstream)
    for place, tensor in enumerate(tensors):
        wanted = difference(function, values, place, upstream)
        np.testing.assert_allclose(tensor.grad.numpy(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", UNARY)
def test_a_method_gives_numpys_value_and_its_gradient(name: str) -> None:
    method, function = UNARY[name]
    value = positive((2, 3, 4), 5)
    tensor = kd.Tensor(value, requires_grad=True)
    y = method(tensor)
    np.testing.assert_allclose(y.numpy(), function(value), rtol=1e-14)
    upstream = positive(y.shape, 6)
    y.backward(upstream)
    np.testing.assert_allclose(tensor.grad.numpy(), difference(function, [value], 0, upstream), rtol=1e-6)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 4)), ((3,), (3, 4)), ((2, 3), (3,)), ((3,), (3,))], ids=str)
def test_a_matrix_product_follows_numpys_rules_for_vectors(shapes: Any) -> None:
    values = [positive(s, k) for k, s in enumerate(shapes)]
    tensors = [kd.Tensor(v, requires_grad=True) for v in values]
    y = tensors[0] @ tensors[1]
    np.testing.assert_allclose(y.numpy(), values[0] @ values[1])
    upstream = positive(y.shape, 9)
    y.backward(upstream)
    for place, tensor in enumerate(tensors):
        wanted = difference(operator.matmul, values, place, upstream)
        np.testing.assert_allclose(tensor.grad.numpy(), wanted, rtol=1e-6)


def test_the_larger_of_two_takes_the_gradient_and_a_tie_shares_it() -> None:
    a, b = kd.Tensor([1.0, 5.0, 2.0], requires_grad=True), kd.Tensor([3.0, 5.0, 1.0], requires_grad=True)
    y = a.maximum(b)
    assert y.numpy().tolist() == [3, 5, 2]
    y.sum().backward()
    assert a.grad.numpy().tolist() == [0, 0.5, 1]
    assert b.grad.numpy().tolist() == [1, 0.5, 0]


@given(
    shapes=mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3, min_side=0),
    name=st.sampled_from(list(BINARY)),
)
def test_the_gradient_of_a_broadcast_value_is_summed_to_its_own_shape(shapes: Any, name: str) -> None:
    function = BINARY[name]
    values = [positive(s, k) for k, s in enumerate(shapes.input_shapes)]
    tensors = [kd.Tensor(v, requires_grad=True) for v in values]
    y = function(*tensors)
    assert y.shape == shapes.result_shape
    np.testing.assert_allclose(y.numpy(), function(*values), rtol=1e-14)
    upstream = positive(y.shape, 9)
    y.backward(upstream)
    for place, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        assert tensor.grad.shape == value.shape
        wanted = difference(function, values, place, upstream)
        np.testing.assert_allclose(tensor.grad.numpy(), wanted, rtol=1e-5, atol=1e-7)


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=3), data=st.data())
def test_reductions_reshapes_and_transposes_agree_with_numpy_for_any_shape(shape: Any, data: st.DataObject) -> None:
    x = positive(shape, 1)
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    axis = tuple(a - len(shape) if data.draw(st.booleans()) else a for a in axes)
    order, keepdims = tuple(data.draw(st.permutations(range(len(shape))))), data.draw(st.booleans())
    t = kd.Tensor(x)
    for name in ("sum", "mean", "max"):
        wanted = getattr(x, name)(axis=axis, keepdims=keepdims)
        np.testing.assert_allclose(getattr(t, name)(axis=axis, keepdims=keepdims).numpy(), wanted, rtol=1e-14)
    np.testing.assert_array_equal(t.transpose(order).numpy(), x.transpose(order))
    np.testing.assert_array_equal(t.transpose(order).reshape(-1).numpy(), x.transpose(order).reshape(-1))


# --- numbers and arrays beside a tensor ---

OTHERS: dict[str, Any] = {
    "float": 1.5,
    "int": 2,
    "NumPy float32": np.float32(1.5),
    "NumPy float64": np.float64(1.5),
    "0-d array": np.array(1.5),
    "array": np.array([[1.5, 0.5, 2.0]]),
    "integer array": np.array([1, 2, 3]),
    "list": [1.5, 0.5, 2.0],
}


@each_float
@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("kind", OTHERS)
def test_numbers_and_arrays_may_stand_on_either_side_and_take_the_tensors_dtype(
    dtype: Any, name: str, kind: str
) -> None:
    function, other, value = BINARY[name], OTHERS[kind], positive((2, 3), 1, dtype)
    plain = np.asarray(other, np.float64)
    for swap in (False, True):
        tensor = kd.Tensor(value, requires_grad=True)
        y = function(other, tensor) if swap else function(tensor, other)
        assert isinstance(y, kd.Tensor)
        assert y.dtype == dtype
        wanted = function(plain, value) if swap else function(value, plain)
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-6)
        y.sum().backward()
        assert tensor.grad.shape == (2, 3)


def test_an_array_times_a_tensor_is_a_recorded_matrix_product() -> None:
    a, w = positive((2, 3), 1), kd.Tensor(positive((3, 4), 2), requires_grad=True)
    y = a @ w
    assert isinstance(y, kd.Tensor)
    y.sum().backward()
    np.testing.assert_allclose(w.grad.numpy(), a.sum(axis=0)[:, None] * np.ones((3, 4)))


def test_whole_numbers_keep_their_value_beside_a_float64_tensor() -> None:
    large = 2**24 + 1  # the first whole number that float32 cannot hold
    one = kd.Tensor(np.float64(1))
    assert (one * large).item() == large
    assert (one * np.array([large])).numpy().tolist() == [large]
    assert (large - one).item() == large - 1


def test_a_power_of_a_negative_number_has_a_finite_gradient() -> None:
    x = kd.Tensor([-3.0, 0.0, 2.0], requires_grad=True)
    (x**2).sum().backward()
    assert x.grad.numpy().tolist() == [-6, 0, 4]


def test_the_power_zero_has_gradient_zero_also_at_zero() -> None:
    x = kd.Tensor([0.0, 2.0], requires_grad=True)
    (x**0).sum().backward()
    assert x.grad.numpy().tolist() == [0, 0]


def test_shapes_that_do_not_broadcast_are_refused_by_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"add: operands must be .*\(2, 3\) and \(2,\)"):
        kd.Tensor(np.ones((2, 3))) + np.ones(2)
    with pytest.raises(ShapeError, match="matmul: operands must be arrays with one or two axes"):
        kd.Tensor(np.ones((2, 2, 2))) @ np.ones(2)
    with pytest.raises(ShapeError):
        kd.Tensor(np.ones((2, 3))) @ np.ones((4, 2))


@pytest.mark.parametrize("other", [1j, "a", None, np.array([object()])])
def test_what_is_no_real_number_is_refused_beside_a_tensor(other: Any) -> None:
    with pytest.raises(DTypeError):
        kd.Tensor([1.0]) + other


def test_two_tensors_that_both_take_a_gradient_must_have_one_dtype() -> None:
    narrow = kd.Tensor(np.ones(2, np.float32), requires_grad=True)
    wide = kd.Tensor(np.ones(2), requires_grad=True)
    with pytest.raises(DTypeError, match=r"float32.*float64.*one dtype"):
        narrow * wide
    y = narrow * kd.Tensor(np.full(2, 3.0))
    assert y.dtype == np.float32
    y.sum().backward()
    assert narrow.grad.dtype == np.float32


# --- making and reading tensors ---


def test_a_tensor_copies_what_it_is_made_of() -> None:
    source = np.zeros(3)
    tensor = kd.Tensor(source)
    source[:] = 7
    assert tensor.numpy().tolist() == [0, 0, 0]
    other = kd.Tensor(tensor)
    with kd.no_grad():
        tensor[:] = 5
    assert other.numpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (1.5, "float64"),
        ([1.5], "float64"),
        (np.float32(1), "float32"),
        (np.ones(2, np.float16), "float32"),
        (np.ones(2, np.int64), "float32"),
        (np.ones(2, bool), "float32"),
        (np.ones((2, 2))[::-1, ::-1], "float64"),
    ],
)
def test_a_tensors_dtype_follows_from_its_data(data: Any, dtype: str) -> None:
    tensor = kd.Tensor(data)
    assert tensor.dtype == dtype
    assert tensor.shape == np.shape(data)
    assert (tensor.ndim, tensor.size) == (np.ndim(data), np.size(data))
    np.testing.assert_array_equal(tensor.numpy(), data)


def test_numpy_gives_a_view_that_cannot_be_written() -> None:
    tensor = kd.Tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        tensor.numpy()[0] = 3
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(tensor)[0] = 3
    written = np.array(tensor)
    written[0] = 3
    assert tensor.numpy().tolist() == [1, 2]


def test_a_tensor_reads_as_a_number_a_length_and_a_text() -> None:
    tensor = kd.Tensor([1.0, 2.0], requires_grad=True)
    assert len(tensor) == 2
    assert float(tensor.sum()) == tensor.sum().item() == 3
    assert repr(tensor) == "Tensor([1., 2.], dtype=float64, requires_grad=True)"
    assert np.asarray(tensor, np.float32).dtype == np.float32


def test_a_copy_or_pickle_holds_the_values_and_whether_a_gradient_is_wanted() -> None:
    tensor = kd.Tensor([1.0, 2.0], requires_grad=True)
    tensor.sum().backward()
    for other in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert other.numpy().tolist() == [1, 2]
        assert other.requires_grad
        assert other.grad is None


def test_an_index_without_a_gradient_reads_values_as_numpy_does() -> None:
    tensor = kd.Tensor(np.arange(6.0).reshape(2, 3))
    assert tensor[1, 2] == 5
    assert tensor[:, 0].tolist() == [0, 3]
    assert [row.tolist() for row in tensor] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("key", [0, (0, 1), (slice(None), 0), None, ...], ids=repr)
def test_an_index_that_cannot_be_recorded_is_refused_with_the_mend(key: Any) -> None:
    tensor = kd.Tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(TapeError, match=r"a slice or a list of rows.*x\.numpy\(\)"):
        tensor[key]


def test_rows_taken_twice_take_their_gradient_twice() -> None:
    tensor = kd.Tensor(np.ones((3, 2)), requires_grad=True)
    tensor.take([2, 0, 2, 2]).sum().backward()
    assert tensor.grad.numpy().tolist() == [[1, 1], [0, 0], [3, 3]]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("row", [3, -1])
def test_a_row_number_out_of_range_is_refused(row: int) -> None:
    with pytest.raises(ArgumentError, match=rf"rows\[1\] must be a row number from 0 to 2 .*got {row}"):
        kd.Tensor(np.ones((3, 2))).take([0, row])


def test_taking_rows_works_for_any_number_of_axes_behind_them() -> None:
    for shape in ((3,), (3, 2), (3, 2, 2)):
        value = positive(shape, 1)
        tensor = kd.Tensor(value, requires_grad=True)
        y = tensor.take([2, 0])
        np.testing.assert_array_equal(y.numpy(), value[[2, 0]])
        y.sum().backward()
        assert tensor.grad.numpy().sum() == 2 * np.prod(shape[1:])


def test_joined_tensors_each_get_their_piece_of_the_gradient() -> None:
    a, b = kd.Tensor(np.ones((2, 3)), requires_grad=True), kd.Tensor(np.ones((2, 1)), requires_grad=True)
    y = F.concatenate([a, b, a], axis=1)
    assert y.shape == (2, 7)
    y.backward(np.arange(14.0).reshape(2, 7))
    np.testing.assert_array_equal(a.grad.numpy(), [[4, 6, 8], [18, 20, 22]])
    np.testing.assert_array_equal(b.grad.numpy(), [[3], [10]])
    with pytest.raises(ArgumentError, match="at least one tensor"):
        F.concatenate([])
    with pytest.raises(ShapeError, match=r"xs\[1\]"):
        F.concatenate([a, b], axis=0)
    with pytest.raises(ArgumentError, match="axis"):
        F.concatenate([a, a], axis=2)


def test_an_axis_or_shape_that_does_not_exist_is_refused_by_name() -> None:
    x = kd.Tensor(np.ones((2, 3)))
    for call in (lambda: x.sum(axis=2), lambda: x.sum(axis=(0, 0)), lambda: x.max(axis=-3)):
        with pytest.raises(ArgumentError, match="axis must be different axes of an array with 2 axes"):
            call()
    for call in (lambda: x.transpose(0, 0), lambda: x.transpose(0), lambda: x.transpose(0, 2)):
        with pytest.raises(ArgumentError, match="axes must be each of the 2 axes once"):
            call()
    for call in (lambda: x.reshape(4), lambda: x.reshape(-1, -1), lambda: x.reshape(4, -1), lambda: x.reshape(-2, -3)):
        with pytest.raises(ShapeError, match="shape must be a shape of 6 elements"):
            call()
    for name in ("mean", "max"):
        with pytest.raises(ShapeError, match="at least one element to reduce"):
            getattr(kd.Tensor(np.ones((0, 3))), name)(axis=0)
    assert kd.Tensor(np.ones((0, 3))).sum(axis=0).numpy().tolist() == [0, 0, 0]


def test_a_numpy_function_that_would_lose_the_gradient_is_refused() -> None:
    x = kd.Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(x)
    (np.array([3.0, 4.0]) * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [3, 4])


def test_only_a_single_element_has_a_truth_value() -> None:
    assert kd.Tensor(2.0)
    assert not kd.Tensor([0.0])
    with pytest.raises(ValueError, match="ambiguous"):
        bool(kd.Tensor([1.0, 2.0]))


def test_an_axis_may_be_an_integer_of_numpy() -> None:
    x = kd.Tensor(np.ones((2, 3)))
    assert x.sum(axis=np.int64(1)).shape == (2,)
    with pytest.raises(ArgumentError, match="axis"):
        x.sum(axis=1.5)
