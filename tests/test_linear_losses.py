"""A last layer and its loss in chunks of rows: equal to doing it at once, whatever the chunks, and small in memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd import functional as F
from minikd.errors import ArgumentError, DTypeError, ShapeError
from minikd.kernels import bind, composed, current_backend

pytestmark = pytest.mark.usefixtures("backend")

each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64])


class Problem:
    """Inputs of one size, drawn from a seed; every third row has no label."""

    def __init__(
        self, n: int = 13, c: int = 11, k: int = 5, j: int = 3, seed: int = 0, dtype: Any = np.float64
    ) -> None:
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> Any:
            return rng.normal(size=shape).astype(dtype)

        self.hidden, self.weight, self.bias = normal(n, k), normal(c, k), normal(c)
        self.projection = F.Projection(normal(n, j), normal(c, j), normal(c))
        self.teacher = self.projection.hidden @ self.projection.weight.T + self.projection.bias
        self.target = rng.integers(0, c, n)
        self.target[::3] = -100

    def chunked(self, **settings: Any) -> Any:
        settings = {"bias": self.bias, "teacher": self.teacher, "target": self.target, **settings}
        return F.linear_distillation_loss(self.hidden, self.weight, **{"return_grad": True, **settings})

    def at_once(self, *, bias: Any = None, target: Any = None, **settings: Any) -> Any:
        logits = self.hidden @ self.weight.T if bias is None else self.hidden @ self.weight.T + bias
        loss, g = F.distillation_loss(logits, self.teacher, target, return_grad=True, **settings)
        return loss, F.Projection(g @ self.weight, g.T @ self.hidden, None if bias is None else g.sum(axis=0))


def assert_equal(found: Any, wanted: Any, dtype: Any) -> None:
    rtol = 1e-12 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(found[0], wanted[0], rtol=rtol, atol=rtol)
    for x, y in zip(found[1], wanted[1], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.shape, x.dtype) == (y.shape, np.dtype(dtype))
            np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(1.0, float(np.abs(y).max())))


# --- the same as at once ---


@each_float
@given(data=st.data())
def test_chunks_give_what_the_composition_at_once_gives(dtype: Any, data: st.DataObject) -> None:
    n, c, k = (data.draw(st.integers(1, most), name) for name, most in (("n", 20), ("c", 40), ("k", 9)))
    problem = Problem(n, c, k, seed=data.draw(st.integers(0, 99), "seed"), dtype=dtype)
    bias = data.draw(st.sampled_from([problem.bias, None]))
    target = data.draw(st.sampled_from([problem.target, None]))
    settings: dict[str, Any] = {
        "bias": bias,
        "target": target,
        "reduction": data.draw(st.sampled_from(["mean", "sum"])),
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 4.0])),
        "hard_weight": data.draw(st.sampled_from([0.0, 0.5])),
        "soft_weight": data.draw(st.sampled_from([0.0, 1.5])),
        "scale_t2": data.draw(st.booleans()),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
    }
    wanted = problem.at_once(**settings)
    rows = data.draw(st.sampled_from([None, 1, 2, 3, 7, n, n + 1]), "chunk_rows")
    for teacher in (problem.teacher, problem.projection):
        assert_equal(problem.chunked(teacher=teacher, chunk_rows=rows, **settings), wanted, dtype)


@each_float
def test_the_loss_depends_on_the_chunks_by_rounding_only(dtype: Any) -> None:
    problem = Problem(50, 23, dtype=dtype)
    losses = [problem.chunked(chunk_rows=rows)[0] for rows in (None, *range(1, 52))]
    np.testing.assert_allclose(losses, losses[0], rtol=8 * np.finfo(dtype).eps)


def test_rows_without_a_label_may_fill_whole_chunks() -> None:
    problem = Problem(12)
    problem.target = np.array([-100] * 4 + [3, -100, -100, 1] + [-100] * 4)
    wanted = problem.at_once(bias=problem.bias, target=problem.target)
    for rows in (1, 4, 5):
        assert_equal(problem.chunked(chunk_rows=rows), wanted, np.float64)
    problem.target[:] = 7
    wanted = problem.at_once(bias=problem.bias, target=np.full(12, 7), ignore_index=7)
    assert_equal(problem.chunked(chunk_rows=5, ignore_index=7), wanted, np.float64)
    assert problem.chunked(chunk_rows=5, ignore_index=7, soft_weight=0)[0] == 0


def test_wide_gradients_are_added_up_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(9, 50, 4)
    wanted = problem.at_once(bias=problem.bias, target=problem.target)
    for rows_of_a_block in (1, 7, 50, 1000):
        monkeypatch.setattr(composed, "BYTES_OF_BLOCK", rows_of_a_block * 4 * 8)
        assert_equal(problem.chunked(chunk_rows=2), wanted, np.float64)


def test_the_loss_alone_is_the_loss_with_its_gradients() -> None:
    problem = Problem(dtype=np.float32)
    for teacher in (problem.teacher, problem.projection):
        alone = problem.chunked(teacher=teacher, chunk_rows=4, return_grad=False)
        assert isinstance(alone, np.float32)
        assert alone == problem.chunked(teacher=teacher, chunk_rows=4)[0]


def test_a_masked_class_has_no_gradient() -> None:
    problem = Problem()
    problem.bias[2] = problem.projection.bias[2] = -np.inf
    problem.target[problem.target == 2] = 3
    loss, gradients = problem.chunked(teacher=problem.projection, chunk_rows=4)
    assert np.isfinite(loss)
    assert gradients.bias[2] == 0
    assert not gradients.weight[2].any()


# --- the chunks ---


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 100, 5000])
def test_chunks_cover_all_rows_once(chunk_rows: int | None) -> None:
    for n in (1, 2, 100, 4096):
        parts = composed.chunks(n, 4 * 32000, chunk_rows)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert all(part.stop > part.start for part in parts)


def test_chunks_of_no_given_length_fit_into_their_buffers_and_are_equally_long() -> None:
    lengths = [part.stop - part.start for part in composed.chunks(4096, 4 * 32000, None)]
    assert max(lengths) * 4 * 32000 <= composed.BYTES_OF_LOGITS
    assert max(lengths) - min(lengths) <= 1
    few = [part.stop - part.start for part in composed.chunks(50, 2**40, None)]
    assert (sum(few), max(few), min(few)) == (50, 13, 12)  # in 4 chunks, the least that FEWEST_ROWS allows
    assert [part.stop for part in composed.chunks(50, 1, 20)] == [20, 40, 50]


def test_no_array_of_all_logits_is_made() -> None:
    n, c, k, rows = 512, 2000, 16, 32
    problem = Problem(n, c, k, dtype=np.float32)
    problem.chunked(chunk_rows=rows)
    one = 4 * rows * c
    # the kernels of NumPy keep some thirty arrays of a chunk's size in float64
    allowed = {"numpy": 60 * one}.get(current_backend(), 3 * one) + 4 * k * c + 2**16
    for teacher in (problem.teacher, problem.projection):
        problem.chunked(teacher=teacher, chunk_rows=rows)
        tracemalloc.start()
        try:
            found = problem.chunked(teacher=teacher, chunk_rows=rows)
            peak = tracemalloc.get_traced_memory()[1] - sum(x.nbytes for x in found[1])
        finally:
            tracemalloc.stop()
        assert peak <= allowed


# --- tensors ---


@pytest.mark.parametrize("form", ["logits", "projection"])
def test_tensors_get_the_gradients_by_backward(form: str) -> None:
    problem = Problem()
    teacher = problem.teacher if form == "logits" else problem.projection
    leaves = [kd.Tensor(x, requires_grad=True) for x in (problem.hidden, problem.weight, problem.bias)]
    loss = F.linear_distillation_loss(*leaves, teacher, problem.target, chunk_rows=4)
    (3 * loss).backward()
    wanted, gradients = problem.chunked(teacher=teacher, chunk_rows=4)
    assert loss.item() == wanted
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), 3 * gradient, rtol=1e-14)


def test_the_gradients_are_the_slopes_of_the_loss() -> None:
    problem, step = Problem(6, 5, 3), 1e-6
    _, gradients = problem.chunked(chunk_rows=4)
    for array, gradient in zip((problem.hidden, problem.weight, problem.bias), gradients, strict=True):
        for place in np.ndindex(array.shape):
            before, losses = array[place], []
            for move in (step, -step):
                array[place] = before + move
                losses.append(problem.chunked(chunk_rows=4, return_grad=False))
            array[place] = before
            np.testing.assert_allclose((losses[0] - losses[1]) / (2 * step), gradient[place], rtol=1e-5, atol=1e-8)


def test_only_what_takes_a_gradient_gets_one_and_the_teacher_never_does() -> None:
    problem = Problem()
    hidden = kd.Tensor(problem.hidden, requires_grad=True)
    teacher = F.Projection(*(kd.Tensor(x, requires_grad=True) for x in problem.projection))
    F.linear_distillation_loss(hidden, problem.weight, None, teacher, problem.target).backward()
    assert hidden.grad is not None
    assert [x.grad for x in teacher] == [None] * 3
    with pytest.raises(ArgumentError, match="return_grad"):
        F.linear_distillation_loss(hidden, problem.weight, None, teacher, return_grad=True)


# --- what is refused ---


@pytest.mark.parametrize(("row", "label"), [(0, 11), (6, -1), (12, 2**40)])
def test_a_label_out_of_range_is_refused_before_anything_is_written(row: int, label: int) -> None:
    problem = Problem()
    outs = [np.full(shape, 5.0) for shape in ((), (13, 5), (11, 5), (11,))]
    target = problem.target.copy()
    target[row] = label
    rest = (problem.teacher, None, None, None, target, *(np.array(v) for v in (4.0, 0.5, 0.5)))
    call = bind("linear_distillation_loss", *outs, problem.hidden, problem.weight, problem.bias, *rest, chunk_rows=2)
    with pytest.raises(ArgumentError, match=rf"linear_distillation_loss: target\[{row}\] .* got {label}\."):
        call()
    assert all(np.all(x == 5) for x in outs)
    target[row] = -100
    call()
    assert not any(np.any(x == 5) for x in outs)


def test_settings_out_of_their_range_are_refused_by_name() -> None:
    problem = Problem()
    wrong: dict[str, tuple[Any, ...]] = {
        "temperature": (0, np.nan, "hot"),
        "hard_weight": (np.inf,),
        "soft_weight": (np.nan,),
        "reduction": ("none", "batchmean"),
        "label_smoothing": (-0.1, 1.5),
        "chunk_rows": (0, -3, 2.5, "all"),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ArgumentError, match=f"linear_distillation_loss: {name}"):
                problem.chunked(**{name: value})


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    problem = Problem()
    p = problem.projection
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("bias", {"bias": problem.bias[1:]}),
        ("teacher", {"teacher": problem.teacher[0]}),
        ("teacher_logits", {"teacher": problem.teacher[1:]}),
        ("teacher_logits", {"teacher": problem.teacher[:, 1:]}),
        ("teacher_hidden", {"teacher": F.Projection(p.hidden[1:], p.weight, p.bias)}),
        ("teacher_weight", {"teacher": F.Projection(p.hidden, p.weight[1:], p.bias)}),
        ("teacher_weight", {"teacher": F.Projection(p.hidden, p.weight[:, 1:])}),
        ("teacher_bias", {"teacher": F.Projection(p.hidden, p.weight, p.bias[1:])}),
        ("target", {"target": problem.target[1:]}),
    ]
    for name, settings in wrong:
        with pytest.raises(ShapeError, match=f"linear_distillation_loss: {name} "):
            problem.chunked(**settings)
    with pytest.raises(DTypeError, match="target"):
        problem.chunked(target=F.softmax(problem.teacher))
    with pytest.raises(ShapeError, match="at least one row"):
        F.linear_distillation_loss(np.ones((2, 0)), np.ones((3, 0)), None, np.ones((2, 3)))


def test_a_teachers_probabilities_in_place_of_its_logits_are_warned_of() -> None:
    problem = Problem()
    with pytest.warns(UserWarning, match="linear_distillation_loss: teacher look like probabilities") as caught:
        problem.chunked(teacher=F.softmax(problem.teacher))
    assert [w.filename for w in caught] == [__file__]
