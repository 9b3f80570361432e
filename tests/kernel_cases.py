"""Cases of every operation's kernels, and how near the reference in float64 results must be: whatever runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minikd.kernels import prepare
from minikd.kernels.arrays import HOST_KINDS
from minikd.kernels.reference import bind_reference
from minikd.ops import OPS
from minikd.ops.op import KINDS

# Runs a kernel by its name on copies of these buffers, and gives these back as plain arrays.
Run = Callable[..., list[Any]]


class Case(NamedTuple):
    """A forward call's written buffers and inputs."""

    written: list[Any]
    inputs: list[Any]
    attrs: dict[str, Any]


def cases(name: str, dtype: str, seed: int = 1) -> Iterator[Case]:
    """The operation's examples, with buffers to be written."""
    op, rng = OPS[name], np.random.default_rng(seed)
    for raw, attrs in op.example(rng, np.dtype(dtype).type):
        full = {**op.attrs, **attrs}
        inputs, _ = prepare(op, raw, np.dtype(dtype))
        shapes, saved = op.infer([None if x is None else np.shape(x) for x in inputs], full)
        kinds = [KINDS[a.kind] or np.dtype(dtype) for a in op.outs]
        outs = [np.full(s, np.nan if k.kind == "f" else -7, k) for s, k in zip(shapes, kinds, strict=True)]
        shape = np.shape(inputs[0]) if inputs else (4, 3) if "m" in op.letters else (67,)
        updates = [
            np.array(3, KINDS[a.kind]) if a.kind in HOST_KINDS else np.abs(rng.normal(size=shape)).astype(dtype)
            for a in op.updates
        ]
        written = [*outs, *updates, *(np.full(s, np.nan, dtype) for s in saved)]
        yield Case(written, [np.asarray(x) if x is not None else None for x in inputs], full)


def reference(name: str, *buffers: Any, **attrs: Any) -> None:
    """Run the reference on these buffers."""
    with np.errstate(all="ignore"):
        bind_reference(name)(*buffers, **{**OPS[name.removesuffix("_vjp")].attrs, **attrs})()


def widen(x: Any) -> Any:
    return x.astype(np.float64) if x is not None and x.dtype.kind == "f" else x


def assert_agrees(actual: Any, wanted: Any, few: float = 64) -> None:
    """Equal, or within `few` times the epsilon of its own size and of the largest; finite where it should be."""
    if actual.dtype.kind != "f":
        np.testing.assert_array_equal(actual, wanted)
        return
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted))
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(wanted))
    finite = wanted[np.isfinite(wanted)]
    tolerance = few * float(np.finfo(actual.dtype).eps)
    np.testing.assert_allclose(
        actual, wanted, rtol=tolerance, atol=tolerance * max(1.0, np.abs(finite).max(initial=0.0))
    )


def check(run: Run, name: str, case: Case, dtype: str, few: float = 64, *, backward: bool = True) -> None:
    """A kernel, and its vjp if it has one and `backward`, against the reference in float64."""
    op = OPS[name]
    wide = [widen(x.copy()) for x in case.written]
    reference(name, *wide, *(widen(x) for x in case.inputs), **case.attrs)
    found = run(name, *case.written, *case.inputs, **case.attrs)
    written = found[: len(case.written)]
    for actual, wanted in zip(written, wide, strict=True):
        assert_agrees(actual, wanted, few)
    for before, after in zip(case.inputs, found[len(case.written) :], strict=True):
        np.testing.assert_array_equal(before, after)
    if op.vjp and backward:
        _check_vjp(run, name, written, case, dtype, few)


def _check_vjp(run: Run, name: str, written: Sequence[Any], case: Case, dtype: str, few: float) -> None:
    op, rng = OPS[name], np.random.default_rng(2)
    places = op.differentiated(len(case.inputs))
    dins = [None if case.inputs[k] is None else np.full_like(case.inputs[k], np.nan) for k in places]
    douts = [np.asarray(rng.normal(size=x.shape), dtype) for x in written[: len(op.outs)]]
    behind = [*douts, *written, *case.inputs]
    arguments = op.arguments(True, len(dins) + len(behind))[len(dins) :]
    unread = [x if a.role == "dout" or a.name in op.vjp_reads else None for a, x in zip(arguments, behind, strict=True)]
    wide = [widen(x) for x in dins]
    reference(name + "_vjp", *wide, *(widen(x) for x in behind), **case.attrs)
    found = run(name + "_vjp", *dins, *unread, **case.attrs)
    for actual, wanted in zip(found, wide, strict=False):
        if wanted is not None:
            assert_agrees(actual, wanted, few)
