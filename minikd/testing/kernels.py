"""`check_kernel`: somebody's kernel against the whole contract of its operation, with the smallest input that fails."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import NoSuchExample

from minikd.errors import ArgumentError
from minikd.ops import OPS
from minikd.testing.contract import Contract, Inputs, Mistake
from minikd.testing.contracts import contract_of
from minikd.testing.layouts import LAYOUTS, in_layout, locked
from minikd.testing.reports import Failure, KernelReport, explained, ulps

CHECKS = {
    "values": "results agree with the reference: in the decided cases, in searched ones, in arrays that are larger",
    "sign": "a loss that cannot be negative is not",
    "same twice": "the same inputs give the same bits, and earlier results stay as they were",
    "untouched inputs": "no input is written to",
    "full overwrite": "every element of a result is written, whatever it held, and nothing beside it",
    "strides": "inputs may lie in memory in any way",
    "read-only inputs": "inputs may be locked",
    "dtypes": "results have the dtype of the inputs",
    "conversions": "float16 and whole numbers give what the same numbers in float32 give",
    "refusals": "a bad label or temperature is a ValueError",
}
ROUNDINGS = 64  # of the dtype's eps, that a result may be off by where nothing else is asked for
MOST_DIGITS_FOR = 64  # numbers in the inputs up to which a failure is measured with mpmath
DIGITS = 30
CONVERTED = ("float16", "int8", "int32", "int64")  # dtypes that are taken for float32
GUARD = 5  # elements around a result that nobody may write


def check_kernel(
    op: str,
    function: Callable[..., Any],
    *,
    rtol: float | Mapping[str, float] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    writes: bool = False,
    array: Callable[[np.ndarray], Any] | None = None,
    refusals: bool = False,
    conversions: bool = False,
    leave_out: Collection[str] = (),
    examples: int = 30,
    seed: int = 0,
    **attrs: Any,
) -> KernelReport:
    """Run a kernel through all that its operation promises; the report is true if everything holds.

    Parameters
    ----------
    op : the kernel's name in `CONTRACTS`, "distillation_loss" for example, whose `signature` says what the function
        takes and gives. A function may give the first result only.
    function : takes NumPy arrays, floats for scalars, and None for a target that is not there; gives arrays, numbers,
        or arrays of CuPy, torch or anything else with DLPack.
    rtol : how far a result may be off, relative to its own size and that of the numbers that it is the difference of;
        one number, or one by dtype. By default 64 roundings of the dtype.
    dtypes : of the real inputs; the first is searched most thoroughly.
    writes : the function takes arrays for its results before its inputs, as the kernels of the table do, and writes
        into them; what is updated (an optimizer's state) is such an array.
    array : makes the array that the function takes of a NumPy array: ``torch.from_numpy``, ``cupy.asarray``.
    refusals : also ask for a ValueError where a label or temperature is bad. Off by default, because a kernel that
        does not look would read memory that is not its own.
    conversions : also ask that float16 and whole numbers are taken for the float32 that they stand for, as the
        library's functions take them. Off by default: a kernel need not take them at all.
    leave_out : names of `CHECKS` that are not to be made.
    examples : cases that are drawn in each region for each dtype; with 0 only the decided ones are looked at.
    seed : of the search; the same seed gives the same report.
    attrs : the operation's attributes that the kernel is made for: ``reduction="sum"``, ``scale_t2=False``.

    Returns
    -------
    A `KernelReport`. ``assert report, report`` shows what is wrong.

    Notes
    -----
    Strides and locked arrays are NumPy's matter: they are not checked with `array` or `writes`. Where the loss is
    +inf its gradient is not looked at. An exception on a legal input is a failure like a wrong number.

    Raises
    ------
    ArgumentError : there is no contract of this name (the message says why), no such attribute or no such check.
    """
    contract = _contract(op, attrs, dtypes, leave_out)
    tolerance = {d: _tolerance(rtol, d) for d in dtypes}
    examination = _Examination(_Kernel(contract, function, attrs, writes, array), tolerance, examples, seed)
    skipped = dict.fromkeys(leave_out, "by request")
    for name, reason in _reasons(contract, writes, array is not None, refusals, conversions).items():
        skipped.setdefault(name, reason)
    checks = tuple(name for name in CHECKS if name not in skipped)
    failures = explained(list(examination.failures(checks)))
    return KernelReport(contract.signature, checks, tuple(skipped.items()), failures, examination.kernel.calls)


def _reasons(contract: Contract, writes: bool, foreign: bool, refusals: bool, conversions: bool) -> dict[str, str]:
    """The checks that are not made, each with the reason."""
    found = {} if refusals else {"refusals": "unless refusals=True"}
    if writes:
        found["conversions"] = "of functions that make their results"
    elif not conversions:
        found["conversions"] = "unless conversions=True"
    if not contract.never_negative:
        found["sign"] = "there is no such promise"
    if writes or foreign:
        found |= dict.fromkeys(("strides", "read-only inputs"), "of NumPy arrays only")
    if not writes:
        found["full overwrite"] = "the function makes its results itself"
    return found


def _contract(op: str, attrs: dict[str, Any], dtypes: Sequence[str], leave_out: Collection[str]) -> Contract:
    where, contract = "check_kernel", contract_of(op)
    known = OPS[op.removesuffix("_vjp")].attrs
    for name in attrs:
        if name not in known:
            expected = f"an attribute of {op}: {', '.join(known) or 'it has none'}"
            raise ArgumentError(where, name, expected=expected, got=repr(attrs[name]))
    for name in leave_out:
        if name not in CHECKS:
            raise ArgumentError(where, "leave_out", expected="names among " + ", ".join(CHECKS), got=repr(name))
    if not dtypes or not set(dtypes) <= {"float64", "float32"}:
        raise ArgumentError(where, "dtypes", expected='"float64", "float32" or both', got=repr(dtypes))
    return contract


def _tolerance(rtol: float | Mapping[str, float] | None, dtype: str) -> float:
    if isinstance(rtol, Mapping):
        rtol = rtol.get(dtype)
    return ROUNDINGS * float(np.finfo(dtype).eps) if rtol is None else float(rtol)


# --- calling the kernel ---


class Outcome(NamedTuple):
    """Results as NumPy arrays, or what was raised; which inputs were changed; and the results as they were given."""

    results: list[np.ndarray]
    raised: BaseException | None
    touched: tuple[str, ...] = ()
    given: Sequence[Any] = ()
    overrun: tuple[str, ...] = ()


def _plain(x: Any) -> np.ndarray:
    """A result of any library as a NumPy array."""
    if isinstance(x, np.ndarray | np.generic | int | float):
        return np.asarray(x)
    if hasattr(x, "detach"):  # torch's
        x = x.detach().cpu()
    elif hasattr(x, "get"):  # CuPy's
        return np.asarray(x.get())
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)


class _Kernel:
    """Somebody's function with what it is called with."""

    def __init__(
        self,
        contract: Contract,
        function: Callable[..., Any],
        attrs: dict[str, Any],
        writes: bool,
        array: Callable[[np.ndarray], Any] | None,
    ) -> None:
        self.contract, self.function, self.attrs, self.writes, self.array = contract, function, attrs, writes, array
        self.calls = 0

    def expected(self, inputs: Inputs, precision: str | int = "float64") -> list[Any]:
        with np.errstate(all="ignore"):
            return self.contract.expected(inputs, self.attrs, precision)

    def run(self, inputs: Inputs, fill: float = np.nan, like: Inputs | None = None) -> Outcome:
        """Call the function on these inputs.

        `fill` is what the arrays for results hold before; these have the shapes of the results of `like`, legal
        inputs where the others are not.
        """
        self.calls += 1
        before = {name: x.copy() for name, x in inputs.items() if isinstance(x, np.ndarray)}
        passed = {name: self._passed(x) for name, x in inputs.items()}
        try:
            with np.errstate(all="ignore"):
                return self._write(like or inputs, passed, fill) if self.writes else self._collect(before, passed)
        except Exception as error:  # whatever somebody's function raises is a finding
            return Outcome([], error)

    def _passed(self, x: Any) -> Any:
        """An input as the function gets it: a copy, unless its place in memory is what matters."""
        if isinstance(x, np.ndarray) and x.ndim:
            x = x.copy() if x.flags.c_contiguous and x.flags.writeable else x
            return x if self.array is None else self.array(x)
        return x.item() if isinstance(x, np.ndarray | np.generic) else x

    def _collect(self, before: Inputs, passed: Inputs) -> Outcome:
        given = self.function(*(passed[name] for name in self.contract.takes))
        given = tuple(given) if isinstance(given, tuple | list) else (given,)
        results = [np.array(_plain(x)) for x in given[: len(self.contract.gives)]]
        return Outcome(results, None, _changed(before, passed), given)

    def _write(self, inputs: Inputs, passed: Inputs, fill: float) -> Outcome:
        """Give it arrays for its results inside larger ones, whose edges show what was written beside them."""
        state, dtype = self.contract.state, _real_dtype(inputs)
        wholes, places = [], []
        for name, wanted in zip(self.contract.gives, self.expected(inputs), strict=True):
            whole = np.full(wanted.size + 2 * GUARD, 77, dtype)
            place = whole[GUARD : GUARD + wanted.size].reshape(wanted.shape)
            place[...] = inputs[name] if name in state else fill
            wholes.append(whole)
            places.append(place)
        taken = [name for name in self.contract.takes if name not in state]
        before = {name: inputs[name].copy() for name in taken if isinstance(inputs[name], np.ndarray)}
        convert = (lambda x: x) if self.array is None else self.array
        given = [convert(place) for place in places]
        self.function(*given, *(passed[name] for name in taken))
        results = [np.array(_plain(x)) for x in given]
        edges = [np.concatenate([w[:GUARD], w[-GUARD:]]) for w in wholes]
        overrun = [name for name, edge in zip(self.contract.gives, edges, strict=True) if not (edge == 77).all()]
        return Outcome(results, None, _changed(before, passed), given, tuple(overrun))


def _changed(before: Inputs, passed: Inputs) -> tuple[str, ...]:
    """Names of the arrays that are no longer what they were."""
    return tuple(n for n, x in before.items() if x.ndim and not np.array_equal(_plain(passed[n]), x, equal_nan=True))


def _real_dtype(inputs: Inputs) -> Any:
    return next(x.dtype for x in inputs.values() if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim)


def _cast(inputs: Inputs, dtype: str) -> Inputs:
    """The real arrays in this dtype; all arrays as copies in one piece."""

    def cast(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return x.astype(dtype if x.dtype.kind == "f" else x.dtype)

    return {name: cast(x) for name, x in inputs.items()}


def _converted(inputs: Inputs, dtype: str) -> tuple[Inputs, Inputs] | None:
    """The real arrays in a dtype of fewer numbers, and those numbers in float32; None where it cannot hold them."""
    real = {name: x for name, x in inputs.items() if _is_real(x)}
    if np.dtype(dtype).kind == "i":
        real = {name: np.rint(x) for name, x in real.items()}
        if not all(np.isfinite(x).all() and np.abs(x).max() <= np.iinfo(dtype).max for x in real.values()):
            return None
    with np.errstate(over="ignore"):
        given = {name: x.astype(dtype) for name, x in real.items()}
    return {**inputs, **given}, {**inputs, **{name: x.astype(np.float32) for name, x in given.items()}}


def tiled(contract: Contract, inputs: Inputs, rows: int, columns: int) -> Inputs:
    """Larger arrays: these, repeated, with a little added to each number so that no two rows are equal.

    What the operation calls n is repeated by `rows`, all other sizes by `columns`, so that shapes still fit.
    """
    rng = np.random.default_rng(rows)
    dims = contract.dims

    def larger(name: str, x: Any) -> Any:
        if not isinstance(x, np.ndarray) or not x.ndim:
            return x
        letters = (rows, columns) if dims[name] == ("...",) else [rows if d == "n" else columns for d in dims[name]]
        found = np.tile(x, letters[: x.ndim])
        return found + rng.uniform(0, 0.5, found.shape) if found.dtype.kind == "f" else found

    return {name: larger(name, x) for name, x in inputs.items()}


# --- comparing ---


class Finding(NamedTuple):
    """What is wrong with one result."""

    check: str
    place: int
    said: str
    ulps: float | None


def _where(name: str, index: tuple[Any, ...]) -> str:
    return f"{name}[{', '.join(str(int(k)) for k in index)}]" if index else name


def _compare(name: str, place: int, got: Any, wanted: Any, scale: Any, rtol: float, dtype: str) -> Finding | None:
    """The worst element of a result that is further off than is allowed."""
    wanted = np.asarray(wanted, np.float64)
    if got.shape != wanted.shape:
        return Finding("values", place, f"{name} has the shape {got.shape}, not {wanted.shape}", None)
    if got.dtype.kind not in "fiu":
        return Finding("values", place, f"{name} is of dtype {got.dtype}", None)
    wide = got.astype(np.float64)
    with np.errstate(all="ignore"):
        same = (wide == wanted) | (np.isnan(wide) & np.isnan(wanted))
        error = np.where(same, 0.0, np.abs(wide - wanted))
        allowed = rtol * (np.abs(wanted) + np.nan_to_num(scale)) + float(np.finfo(dtype).tiny)
        excess = np.where(same, 0.0, error / allowed)
    excess = np.where(same | np.isfinite(wide + wanted), excess, np.inf)
    if not excess.size or excess.max() <= 1:
        return None
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    a, b = float(wide[worst]), float(wanted[worst])
    off = ulps(a, b, dtype)
    said = f"{_where(name, worst)} is {a:.9g} and should be {b:.9g}"
    if np.isfinite(off):
        said += f", off by {off:.3g} ulp, {float(excess[worst]):.3g} times what is allowed"
    return Finding("values", place, said, off)


def _alike(a: Any, b: Any) -> bool:
    """Whether a result is what a mistake would give."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return False
    with np.errstate(all="ignore"):
        largest = np.max(np.abs(b), where=np.isfinite(b), initial=0.0)
        return bool(np.allclose(a, b, rtol=1e-5, atol=1e-6 * min(largest, 1.0), equal_nan=True))


def _largest_gap(a: Any, b: Any, dtype: str) -> float:
    """The largest difference of two results in ulp."""
    if a.shape != b.shape:
        return float("inf")
    return max((ulps(float(x), float(y), dtype) for x, y in zip(a.ravel(), b.ravel(), strict=True)), default=0.0)


class _Examination:
    """All checks of one kernel."""

    def __init__(self, kernel: _Kernel, tolerance: dict[str, float], examples: int, seed: int) -> None:
        self.kernel, self.contract, self.tolerance = kernel, kernel.contract, tolerance
        self.examples, self.seed = examples, seed

    def failures(self, checks: Collection[str]) -> Iterator[Failure]:
        self.checks = checks
        if "values" in checks or "sign" in checks:
            yield from self._values()
        for dtype in self.tolerance:
            inputs = _cast(self._plain_inputs(), dtype)
            for check, method in (
                ("same twice", self._same_twice),
                ("untouched inputs", self._untouched),
                ("full overwrite", self._overwrite),
                ("strides", self._strides),
                ("read-only inputs", self._locked),
                ("dtypes", self._dtypes),
                ("refusals", self._refusals),
            ):
                if check in checks:
                    yield from method(inputs, dtype)
        if "conversions" in checks:
            yield from self._conversions()

    def _plain_inputs(self) -> Inputs:
        return self.contract.edges[0].inputs

    # --- values ---

    def _values(self) -> Iterator[Failure]:
        """Decided cases, larger arrays, and every region; what fails in one dtype is not looked for in the next."""
        failed: set[str] = set()
        plain, smallest, name = self._plain_inputs(), False, self.contract.edges[0].name
        larger = {
            f"{name}, repeated {r} by {w} times": tiled(self.contract, plain, r, w) for r, w in ((3, 7), (20, 40))
        }
        decided = {**{e.name: e.inputs for e in self.contract.edges}, **larger}
        for dtype in self.tolerance:
            for name, inputs in decided.items():
                found = None if name in failed else self._failure(name, _cast(inputs, dtype), dtype)
                if found is not None:
                    failed.add(name)
                    yield found
            for kind in self.contract.kinds if self.examples else ():
                region = f"{kind} inputs"
                found = None if region in failed else self._search(kind, region, dtype, shrink=not smallest)
                if found is not None:
                    failed.add(region)
                    smallest = True
                    yield found

    def _search(self, kind: str, region: str, dtype: str, shrink: bool) -> Failure | None:
        """A failing case of this kind; the smallest, if it is to be shrunk."""
        strategy = self.contract.draw(kind, np.dtype(dtype))
        phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
        chosen = settings(
            max_examples=self.examples,
            phases=phases,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )

        def fails(inputs: Inputs) -> bool:
            return self._finding(inputs, dtype) is not None

        try:
            inputs = find(strategy, fails, settings=chosen, random=random.Random(self.seed))
        except NoSuchExample:
            return None
        return self._failure(region, inputs, dtype)

    def _finding(self, inputs: Inputs, dtype: str) -> Finding | None:
        """What is wrong with the results for these inputs."""
        outcome = self.kernel.run(_cast(inputs, dtype))
        if outcome.raised is not None:
            return self._raised(outcome)
        wanted = self.kernel.expected(inputs)
        scales = self._scales(inputs)
        infinite = self.contract.gives[0] == "loss" and bool(np.isinf(np.asarray(wanted[0], float)).any())
        for k, got in enumerate(outcome.results):
            if not (k and infinite) and "values" in self.checks:
                found = _compare(self.contract.gives[k], k, got, wanted[k], scales[k], self.tolerance[dtype], dtype)
                if found is not None:
                    return found
        first = outcome.results[0]
        if "sign" in self.checks and first.size and bool((first < 0).any()):
            return Finding("sign", 0, f"{self.contract.gives[0]} is {float(first.min()):.3g}, below 0", None)
        return None

    def _scales(self, inputs: Inputs) -> list[Any]:
        """How large the numbers are whose rounding each result inherits."""
        with np.errstate(all="ignore"):
            return [*self.contract.scale(inputs, self.kernel.attrs), *([0.0] * len(self.contract.gives))]

    def _raised(self, outcome: Outcome) -> Finding:
        message = " ".join(str(outcome.raised).split())[:200]
        return Finding("values", 0, f"{type(outcome.raised).__name__} is raised: {message}", None)

    def _failure(self, region: str, inputs: Inputs, dtype: str) -> Failure | None:
        """The failure that these inputs show, measured with more digits than the reference has."""
        found = self._finding(inputs, dtype)
        if found is None:
            return None
        outcome = self.kernel.run(_cast(inputs, dtype))
        if found.place >= len(outcome.results):
            return Failure(found.check, region, found.said, dtype, inputs)
        got, wanted = outcome.results[found.place], self.kernel.expected(inputs)[found.place]
        if (
            sum(map(np.size, inputs.values())) <= MOST_DIGITS_FOR
            and got.shape == wanted.shape
            and found.ulps is not None
        ):
            exact = self.kernel.expected(inputs, DIGITS)[found.place]
            wanted = np.array([float(x) for x in np.asarray(exact, object).ravel()]).reshape(wanted.shape)
            name, scale = self.contract.gives[found.place], self._scales(inputs)[found.place]
            found = _compare(name, found.place, got, wanted, scale, self.tolerance[dtype], dtype) or found
        mistakes = self._mistakes(inputs, dtype, found.place)
        return Failure(found.check, region, found.said, dtype, inputs, got, wanted, found.ulps, mistakes)

    def _mistakes(self, inputs: Inputs, dtype: str, place: int) -> tuple[str, ...]:
        """The usual mistakes that would give this result here, and what the kernel gives for plain inputs too.

        Where some of them would give all its results, the others are left out.
        """
        plain = self._plain_inputs()
        larger = [tiled(self.contract, plain, *by) for by in ((3, 7), (20, 40))]
        cases = [_cast(case, dtype) for case in (inputs, plain, *larger)]
        outcomes = [self.kernel.run(case) for case in cases]
        if any(len(outcome.results) <= place for outcome in outcomes):
            return ()
        right = [self.kernel.expected(case)[place] for case in cases]
        fit, throughout = [], []
        for mistake in self.contract.mistakes:
            given = list(self._while_it_fits(mistake, cases, outcomes, place))
            if len(given) < len(cases) or all(_alike(g[place], r) for g, r in zip(given, right, strict=True)):
                continue
            fit.append(mistake.name)
            if all(all(map(_alike, o.results, g)) for o, g in zip(outcomes, given, strict=True)):
                throughout.append(mistake.name)
        return tuple(dict.fromkeys(throughout or fit))

    def _while_it_fits(
        self, mistake: Mistake, cases: list[Inputs], outcomes: list[Outcome], place: int
    ) -> Iterator[list[Any]]:
        """What the mistake would give, case by case, up to the first in which the kernel gives something else."""
        for case, outcome in zip(cases, outcomes, strict=True):
            with np.errstate(all="ignore"):
                given = _as_list(mistake.give(case, self.kernel.attrs))
            if not _alike(outcome.results[place], given[place]):
                return
            yield given

    # --- what holds for every call ---

    def _same_twice(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        larger = _cast(tiled(self.contract, self._plain_inputs(), 20, 40), dtype)
        for region, case in (("plain inputs", inputs), ("larger arrays", larger)):
            first, second = self.kernel.run(case), self.kernel.run(case)
            for name, a, b in zip(self.contract.gives, first.results, second.results, strict=False):
                if a.tobytes() != b.tobytes():
                    said = f"{name} differs from call to call, by {_largest_gap(b, a, dtype):.3g} ulp"
                    yield Failure("same twice", region, said, dtype, case, b, a)
        first = self.kernel.run(inputs)
        self.kernel.run({n: x * 0.5 if _is_real(x) else x for n, x in inputs.items()})
        for name, before, now in zip(self.contract.gives, first.results, first.given, strict=False):
            if before.tobytes() != np.array(_plain(now)).tobytes():
                said = f"{name} of an earlier call is changed by a later one"
                yield Failure("same twice", "plain inputs", said, dtype, inputs, np.array(_plain(now)), before)

    def _untouched(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        for edge in self.contract.edges:
            case = _cast(edge.inputs, dtype)
            touched = self.kernel.run(_cast(case, dtype)).touched
            if touched:
                yield Failure("untouched inputs", edge.name, f"{', '.join(touched)} is written to", dtype, case)
                return

    def _overwrite(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        for edge in self.contract.edges:
            case = _cast(edge.inputs, dtype)
            first, second = self.kernel.run(case), self.kernel.run(case, fill=123.0)
            for name in first.overrun:
                said = f"memory beside {name} is written"
                yield Failure("full overwrite", edge.name, said, dtype, case)
                return
            for name, a, b in zip(self.contract.gives, first.results, second.results, strict=False):
                if a.tobytes() != b.tobytes():
                    said = f"{name} depends on what its array held before"
                    yield Failure("full overwrite", edge.name, said, dtype, case, b, a)
                    return

    def _strides(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        for layout in LAYOUTS:
            yield from self._in_other_memory("strides", partial(in_layout, layout=layout), layout, dtype)

    def _locked(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        yield from self._in_other_memory("read-only inputs", locked, "locked", dtype)

    def _in_other_memory(self, check: str, change: Callable[[Any], Any], said: str, dtype: str) -> Iterator[Failure]:
        """Whether the results stay the same up to rounding when the inputs lie in memory in another way."""
        inputs = _cast(self._plain_inputs(), dtype)
        usual = self.kernel.run(inputs)
        moved = {n: change(x) if isinstance(x, np.ndarray) and x.ndim else x for n, x in inputs.items()}
        outcome = self.kernel.run(moved)
        if outcome.raised is not None and usual.raised is None:
            yield Failure(check, f"inputs {said}", self._raised(outcome).said, dtype, inputs)
        for name, a, b in zip(self.contract.gives, usual.results, outcome.results, strict=False):
            if not _alike(b, a):
                region = f"inputs {said}"
                yield Failure(check, region, f"{name} is another than of inputs in one piece", dtype, inputs, b, a)

    def _dtypes(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        outcome = self.kernel.run(inputs)
        for name, given, result in zip(self.contract.gives, outcome.given, outcome.results, strict=False):
            scalar = not result.ndim and (isinstance(given, float) or result.dtype == np.float64)
            if result.dtype != np.dtype(dtype) and not scalar:
                said = f"{name} is of {result.dtype} where the inputs are of {dtype}"
                yield Failure("dtypes", "plain inputs", said, dtype, inputs)

    def _conversions(self) -> Iterator[Failure]:
        """For each dtype the first decided case in which the same numbers in float32 give something else."""
        for dtype in CONVERTED:
            pairs = ((edge.name, _converted(edge.inputs, dtype)) for edge in self.contract.edges)
            found = (self._conversion(name, *pair, dtype) for name, pair in pairs if pair is not None)
            yield from itertools.islice(filter(None, found), 1)

    def _conversion(self, region: str, given: Inputs, same: Inputs, dtype: str) -> Failure | None:
        outcome, wanted = self.kernel.run(given), self.kernel.run(same)
        if outcome.raised is not None and wanted.raised is None:
            return Failure("conversions", region, self._raised(outcome).said, dtype, given)
        for name, a, b in zip(self.contract.gives, outcome.results, wanted.results, strict=False):
            if (a.dtype, a.tobytes()) != (b.dtype, b.tobytes()):
                said = f"{name}, of {a.dtype}, is not what the same numbers in float32 give, which is of {b.dtype}"
                return Failure("conversions", region, said, dtype, given, a, b)
        return None

    def _refusals(self, inputs: Inputs, dtype: str) -> Iterator[Failure]:
        for name, changed in self.contract.refuses:
            case = {**inputs, **changed}
            outcome = self.kernel.run(case, like=inputs)
            if not isinstance(outcome.raised, ValueError):
                got = "nothing is raised" if outcome.raised is None else self._raised(outcome).said
                yield Failure("refusals", name, f"{got}, where a ValueError is expected", dtype, case)


def _is_real(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]
