"""Layers and networks, and the arena in which an optimizer keeps their parameters side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from minikd import functional as F
from minikd.errors import ArgumentError, ShapeError
from minikd.kernels import FLOATS, as_real, run
from minikd.kernels.arrays import here, host_copy, is_array, module_of, on_device, to_host
from minikd.kernels.recording import LAYOUT, Recorder, recorder, refuse, refuse_reading, traced
from minikd.ops.elementwise import ACTIVATIONS
from minikd.steps import Step
from minikd.tape import no_grad
from minikd.tensor import Tensor
from minikd.variant import NOT_RUN

__all__ = [
    "GELU",
    "MLP",
    "Arena",
    "Dropout",
    "Linear",
    "Module",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Tanh",
    "initial_weights",
]

# Rows that predict and logits send through a network at a time: enough for the products, few enough for the cache.
ROWS_AT_A_TIME = 512
ROWS_ON_A_DEVICE = 16384  # the same on a GPU, which needs many rows to be busy


class Arena:
    """One flat array for the values of some parameters and one for their gradients.

    The parameters become views of it, so that an optimizer's step is one pass over memory.

    Parameters
    ----------
    parameters : tensors of one dtype that belong to no other arena.

    Raises
    ------
    ArgumentError : a parameter already lives in another arena, comes twice, or there is none.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        dtypes, places = {p.dtype for p in self.parameters}, {p.device for p in self.parameters}
        if len(dtypes) != 1 or len(places) != 1 or len({id(p) for p in self.parameters}) != len(self.parameters):
            expected = "a list of different parameters of one dtype in one place"
            got = f"{len(self.parameters)} parameters of dtypes {sorted(str(d) for d in dtypes)}"
            got += f" on {' and '.join(sorted(places))}" if len(places) > 1 else ""
            raise ArgumentError("Arena", "parameters", expected=expected, got=got)
        if any(p.arena is not None for p in self.parameters):
            raise _in_another_arena()
        size = sum(p.size for p in self.parameters)
        xp = module_of(self.parameters[0].array)
        self.values = xp.empty(size, dtypes.pop())
        self.gradients = xp.zeros_like(self.values)
        start = 0
        for p in self.parameters:
            place = slice(start, start + p.size)
            p.move_into(self, self.values[place].reshape(p.shape), self.gradients[place].reshape(p.shape))
            start += p.size

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Arena:
        """The arena of exactly these parameters: the one that they already share, else a new one."""
        wanted = list(parameters)
        arena = wanted[0].arena if wanted else None
        if arena is not None and {id(p) for p in arena.parameters} == {id(p) for p in wanted}:
            return arena
        return cls(wanted)


def _in_another_arena() -> ArgumentError:
    return ArgumentError(
        "Arena",
        "parameters",
        expected="parameters that no other optimizer holds",
        got="one that another arena holds",
        fix="Give one optimizer all parameters that are trained together, or train a copy of the model.",
    )


def initial_weights(
    rng: np.random.Generator, outputs: int, inputs: int, activation: str | None, dtype: Any
) -> np.ndarray:
    """Weights (outputs, inputs) whose signal neither grows nor fades with depth.

    He et al. 2015, eq. 10 (normal, variance 2 / inputs) in front of ReLU and GELU, which pass half of their input;
    Glorot and Bengio 2010, eq. 16 (uniform, variance 2 / (inputs + outputs)) in front of anything else.
    """
    if activation in ("relu", "gelu"):
        return rng.normal(0.0, math.sqrt(2.0 / inputs), (outputs, inputs)).astype(dtype)
    limit = math.sqrt(6.0 / (inputs + outputs))
    return rng.uniform(-limit, limit, (outputs, inputs)).astype(dtype)


class Normalises(Protocol):
    """What turns raw features into a network's inputs (minikd.data.Normalisation, for one)."""

    @property
    def mean(self) -> Any: ...

    @property
    def deviation(self) -> Any: ...

    def apply(self, x: Any) -> Any: ...


class Module:
    """A network or a part of one: tensors and other modules as attributes, and a forward function.

    Attributes
    ----------
    training : whether dropout is active; `train()` and `eval()` switch it in all parts.
    normalisation : applied by `predict`, `predict_proba` and `logits` (not by a plain call) if it is not None.
    class_names : names of the classes, or None.
    """

    _predictor: _Predictor | None = None  # made by the first use

    def __init__(self) -> None:
        self.training = True
        self.normalisation: Normalises | None = None
        self.class_names: tuple[str, ...] | None = None

    def forward(self, x: Any) -> Any:
        """Compute the output; every kind of module has its own."""
        raise TypeError(f"{type(self).__name__} has no forward function; give it one")

    def __call__(self, x: Any, features: Sequence[str] = ()) -> Any:
        """The output for inputs x (n, k), or with `features` the pair (output, {name: what that part put out})."""
        writing = recorder()
        if writing is not None:
            self._guard_parts(writing)
        if not features:
            return self.forward(x)
        known = dict(self.named_modules())
        unknown = [name for name in features if name not in known]
        if unknown:
            expected = "names of parts: " + ", ".join(n for n in known if n)
            raise ArgumentError("Module", "features", expected=expected, got=", ".join(unknown))
        return self._forward_with_features(x, features)

    def _forward_with_features(self, x: Any, features: Sequence[str]) -> Any:
        raise ArgumentError("Module", "features", expected="asked of a Sequential", got=type(self).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if recorder() is not None and (isinstance(value, Tensor) or is_array(value)):
            refuse("a tensor or an array put into a module", "Return it from the step, and keep it outside.")
        object.__setattr__(self, name, value)
        LAYOUT.changed()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the plans."""
        return {name: value for name, value in vars(self).items() if name != "_predictor"}

    def _guard_parts(self, writing: Recorder) -> None:
        """A plan holds for the parts, parameters and modes that it was recorded with."""
        for _, module in self.named_modules():
            for name, value in vars(module).items():
                if value is None or isinstance(value, _GUARDED) or on_device(value):
                    writing.guard(module, name)

    # --- parts and parameters ---

    def children(self) -> Iterator[tuple[str, Module]]:
        """The direct parts with their names."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module (under the name "") and all parts, in order, with dotted names."""
        yield prefix.rstrip("."), self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}{name}.")

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of all parts, in order, with dotted names; a shared one once."""
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}.{name}".lstrip("."), value

    def parameters(self) -> list[Tensor]:
        """All tensors of all parts, in order."""
        return [p for _, p in self.named_parameters()]

    @property
    def parameter_count(self) -> int:
        """Numbers that training can change."""
        return sum(p.size for p in self.parameters())

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter by name, as a PyTorch Sequential has them ("0.weight" is (outputs, inputs))."""
        return {name: host_copy(p.array) for name, p in self.named_parameters()}

    def to(self, place: str) -> Module:
        """Move all parameters to where this backend computes ("cupy", "numpy", …), or to "cuda" or "cpu"; returns self.

        They leave the arena of the optimizer that they had, which takes no further step: make a new one.

        Raises
        ------
        ArgumentError : an unknown place.  BackendError : there is no GPU.
        """
        refuse("a model moved in the step", "Move it before the step.")
        for parameter in self.parameters():
            parameter.move_to(place)
        return self

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write these values into the parameters, in place; nothing is written unless everything fits.

        Raises
        ------
        ArgumentError : names are missing or unknown.  ShapeError : a shape differs.
        """
        own = dict(self.named_parameters())
        if set(own) != set(state):
            missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            got = f"missing {missing or 'none'}, unknown {extra or 'none'}"
            raise ArgumentError("load_state_dict", "state", expected="a value for each parameter", got=got)
        values = {name: as_real("load_state_dict", name, v) for name, v in state.items()}
        for name, value in values.items():
            if value.shape != own[name].shape:
                expected = f"of shape {own[name].shape}"
                raise ShapeError("load_state_dict", name, expected=expected, got=f"shape {value.shape}")
        with no_grad():
            for name, value in values.items():
                own[name][...] = value

    def counters(self) -> dict[str, np.ndarray]:
        """What parts count while they train (`Dropout` its passes) by dotted name, a shared one once.

        These are the int64 arrays without axes themselves: to write into one sets that count, in compiled steps too.
        """
        refuse_reading("the counters of a module")
        found: dict[str, np.ndarray] = {}
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                counts = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype == np.int64
                if counts and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{prefix}.{name.lstrip('_')}".lstrip(".")] = value
        return found

    # --- modes ---

    def train(self, mode: bool = True) -> Module:
        """Switch training behaviour (dropout) on or off in all parts; returns self."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch training behaviour off; returns self."""
        return self.train(False)

    # --- use ---

    def logits(self, x: Any, *, normalised: bool = False) -> np.ndarray:
        """Raw scores (n, c) of raw features x (n, k) or (k,): normalised first, without dropout or gradients.

        `normalised` says that x is on the network's own scale already. Under the backend "cupy" NumPy's arrays are
        taken to the GPU and the result back, some rows at a time; what is asked of CuPy's arrays stays there.
        """
        return self._predicted("scores" if normalised else "logits", x)

    def predict_proba(self, x: Any, temperature: float = 1.0) -> np.ndarray:
        """Class probabilities (n, c) of raw features x (n, k)."""
        return self._predicted("probabilities", x, temperature)

    def predict(self, x: Any) -> np.ndarray:
        """The most probable class id of each row of raw features x (n, k)."""
        return self._predicted("classes", x)

    def _predicted(self, what: str, x: Any, *settings: Any) -> np.ndarray:
        """`_Predictor.forms[what]` of x, in pieces of ROWS_AT_A_TIME rows."""
        predictor = self._predictor
        if predictor is None:
            predictor = _Predictor(self)
            object.__setattr__(self, "_predictor", predictor)
        elif predictor.version == LAYOUT.version:  # nothing was rearranged: the plan of the last time may do
            found = predictor.forms[what].replay(x, *settings)
            if found is not NOT_RUN:
                return found
        at_a_time = ROWS_ON_A_DEVICE if here.on_device else ROWS_AT_A_TIME
        if type(x) is here.array and x.ndim == 2 and 0 < len(x) <= at_a_time and x.dtype in FLOATS:
            return predictor(what, x, settings)
        array = as_real("logits", "x", x.array if isinstance(x, Tensor) else x)
        if array.ndim == 0:
            raise ShapeError("predict", "x", expected="rows of features (n, k), or one row (k,)", got="a single number")
        rows = array[None] if array.ndim == 1 else array.reshape(len(array), math.prod(array.shape[1:]))
        starts = range(0, max(len(rows), 1), at_a_time)
        pieces = [_back(predictor(what, here.put(p), settings), p) for p in (rows[k : k + at_a_time] for k in starts)]
        if len(pieces) > 1:
            refuse("predictions for so many rows", f"Give {at_a_time} at most, or call the model on a tensor.")
        found = pieces[0] if len(pieces) == 1 else module_of(pieces[0]).concatenate(pieces)
        return found[0] if array.ndim == 1 else found


def _back(found: Any, rows: Any) -> Any:
    """A result where the rows that it is of were given."""
    return found if on_device(rows) else to_host(found)


# Kinds of attributes that a plan depends on, beside None: another value makes another plan.
_GUARDED = Module | Tensor | np.ndarray | tuple | bool | int | float | str


class _Predictor:
    """A module in use, without dropout or gradients, by plans for each number of rows that comes twice."""

    def __init__(self, module: Module) -> None:
        forms: dict[str, Callable[..., Any]] = {
            "scores": self._scores,
            "logits": self._of_raw,
            "probabilities": lambda rows, t: F.softmax(self._of_raw(rows), temperature=t),
            "classes": lambda rows: F.argmax(self._of_raw(rows)),
        }
        self.module = module
        self.forms = {name: Step(form, fallback=True, differentiable=False) for name, form in forms.items()}
        self.version = -1  # of LAYOUT, when all parts were last seen in evaluation mode
        self.dtype: Any = None
        self.scale: tuple[Any, ...] | None = None  # mean and deviation of the features in this dtype
        self._scale_of: Any = None
        self._scale_in: Any = None

    def __call__(self, what: str, rows: np.ndarray, settings: Sequence[Any]) -> np.ndarray:
        if self.version != LAYOUT.version:
            return self._in_evaluation_mode(what, rows, settings)
        if rows.dtype != self.dtype:
            rows = rows.astype(self.dtype)
        if not len(rows) and what in ("probabilities", "classes"):
            scores = self.forms["logits"](rows)  # the kernels of rows of classes refuse to have none
            return scores.argmax(axis=1) if what == "classes" else scores
        found: np.ndarray = self.forms[what](rows, *settings)
        return found

    def _of_raw(self, rows: Any) -> Any:
        writing = recorder()
        if writing is not None:
            writing.guard(self, "scale")
            writing.guard(self.module, "normalisation")
        return self._scores(rows if self.scale is None else F.standardise(rows, *self.scale))

    def _scores(self, rows: Any) -> Any:
        writing = recorder()
        if writing is not None:
            self.module._guard_parts(writing)
            if any(isinstance(v, list | dict | set) for _, m in self.module.named_modules() for v in vars(m).values()):
                refuse("a model with a list, dict or set, whose content nobody watches", "Keep it in attributes.")
        return _values(self.module.forward(rows))

    def _in_evaluation_mode(self, what: str, rows: np.ndarray, settings: Sequence[Any]) -> np.ndarray:
        """Switch off the training mode of those parts that are in it, and remember if there were none."""
        module = self.module
        parameters, modules = module.parameters(), [m for _, m in module.named_modules()]
        dtype = parameters[0].dtype if parameters else rows.dtype
        if (self._scale_of, self._scale_in) != (module.normalisation, here.xp) or self.dtype != dtype:
            self._scale_of, self._scale_in = module.normalisation, here.xp
            self.dtype, given = dtype, module.normalisation
            columns = rows.shape[1]
            vectors = () if given is None else (given.mean, given.deviation)
            self.scale = tuple(here.put(_for_columns(v, columns, dtype)) for v in vectors) or None
        training = [m for m in modules if m.training]
        try:
            for m in training:
                m.training = False
            self.version = LAYOUT.version
            return self(what, rows, settings)
        finally:
            for m in training:
                m.training = True


def _values(scores: Any) -> Any:
    """What a forward function returned, as an array."""
    return traced(scores.array) if isinstance(scores, Tensor) else scores


def _for_columns(values: Any, columns: int, dtype: Any) -> np.ndarray:
    """A number for each column, of this dtype; a single number is for all of them."""
    array = np.ascontiguousarray(values, dtype)
    return np.full(columns, array.item()).astype(dtype) if array.size == 1 else array


class Linear(Module):
    """y = x wᵀ + b.

    Parameters
    ----------
    inputs, outputs : sizes k and m.
    bias : whether there is a b, which begins at 0.
    seed : of the initial weights; a Generator is drawn from.
    activation : what follows this layer; it only decides how large the first weights are (see `initial_weights`).
    dtype : float32 or float64.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        *,
        seed: int | np.random.Generator = 0,
        activation: str | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("outputs", outputs)):
            if int(size) != size or size < 1:
                raise ArgumentError("Linear", name, expected="a whole number from 1", got=repr(size))
        rng = np.random.default_rng(seed)
        weights = initial_weights(rng, outputs, inputs, activation, dtype)
        self.weight = Tensor.of(here.put(weights), requires_grad=True)
        self.bias = Tensor.of(here.put(np.zeros(outputs, dtype)), requires_grad=True) if bias else None

    def forward(self, x: Any, activation: str | None = None) -> Any:
        """The product, with bias and activation in one further pass; refuses x that is not (n, k)."""
        shape = x.shape if hasattr(x, "shape") else np.shape(x)
        if len(shape) != 2 or shape[1] != self.weight.shape[1]:
            expected, fix = f"of shape (n, {self.weight.shape[1]})", "Flatten images to one row each."
            raise ShapeError("Linear", "x", expected=expected, got=f"shape {shape}", fix=fix)
        return F.linear(x, self.weight, self.bias, activation)


class _Activation(Module):
    """One of the activations of the table, as a layer."""

    kind = ""

    def forward(self, x: Any) -> Any:
        return _ACTIVATION_FUNCTIONS[self.kind](x)


class ReLU(_Activation):
    """max(x, 0)."""

    kind = "relu"


class GELU(_Activation):
    """x·Φ(x), Hendrycks and Gimpel 2016."""

    kind = "gelu"


class Tanh(_Activation):
    """The hyperbolic tangent."""

    kind = "tanh"


class Sigmoid(_Activation):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"


_ACTIVATION_FUNCTIONS: dict[str, Callable[[Any], Any]] = {name: getattr(F, name) for name in ACTIVATIONS}
ACTIVATION_LAYERS: dict[str, type[_Activation]] = {c.kind: c for c in (ReLU, GELU, Tanh, Sigmoid)}


class Dropout(Module):
    """In training, sets elements to 0 with probability p and scales the others by 1 / (1 - p).

    Parameters
    ----------
    p : share of elements dropped.
    seed, stream : with the number of training passes so far they decide the mask; give each layer its own stream.
    """

    def __init__(self, p: float = 0.5, *, seed: int = 0, stream: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ArgumentError("Dropout", "p", expected="in [0, 1)", got=repr(p))
        self.p, self.seed, self.stream = float(p), int(seed), int(stream)
        self._step = np.zeros((), np.int64)

    @property
    def step(self) -> int:
        """Training passes so far."""
        refuse_reading("the step of a dropout layer")
        return int(self._step)

    def forward(self, x: Any) -> Any:
        if not self.training or self.p == 0:
            return x
        run("advance", self._step)
        return F.dropout(x, self.p, seed=self.seed, stream=self.stream, step=self._step)


class Sequential(Module):
    """Modules one after the other. A Linear followed by an activation runs as one product and one fused pass."""

    def __init__(self, *layers: Module) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((str(k), layer) for k, layer in enumerate(self.layers))

    def forward(self, x: Any) -> Any:
        return self._run(x, ())[0]

    def _forward_with_features(self, x: Any, features: Sequence[str]) -> Any:
        return self._run(x, features)

    def _run(self, x: Any, features: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        found: dict[str, Any] = {}
        k = 0
        while k < len(self.layers):
            layer, following = self.layers[k], self.layers[k + 1] if k + 1 < len(self.layers) else None
            if isinstance(layer, Linear) and isinstance(following, _Activation) and str(k) not in features:
                x = layer.forward(x, following.kind)
                k += 1
            else:
                inner = [f.split(".", 1)[1] for f in features if f.startswith(f"{k}.")]
                if inner:
                    x, parts = layer(x, features=inner)
                    found.update({f"{k}.{name}": value for name, value in parts.items()})
                else:
                    x = layer(x)
            if str(k) in features:
                found[str(k)] = x
            k += 1
        return x, found


class MLP(Sequential):
    """A multi-layer perceptron that puts out logits.

    Parameters
    ----------
    sizes : inputs, hidden layers, classes: [784, 800, 800, 10].
    activation : "relu", "gelu", "tanh" or "sigmoid", after each hidden layer.
    dropout : probability of dropping a hidden unit in training; 0 leaves the dropout layers out.
    input_dropout : the same for the inputs (Hinton et al. 2012 drop 0.2 of the pixels).
    seed : of the initial weights and the dropout masks; the same seed gives the same network.
    dtype : float32 or float64.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        seed: int = 0,
        *,
        input_dropout: float = 0.0,
        dtype: Any = np.float32,
    ) -> None:
        if len(sizes) < 2 or any(int(s) != s or s < 1 for s in sizes):
            expected = "at least an input and an output size, each from 1"
            raise ArgumentError("MLP", "sizes", expected=expected, got=str(list(sizes)))
        if activation not in ACTIVATIONS:
            raise ArgumentError("MLP", "activation", expected="one of " + ", ".join(ACTIVATIONS), got=repr(activation))
        rng = np.random.default_rng(seed)
        layers: list[Module] = []

        def add_dropout(p: float) -> None:
            if p:
                layers.append(Dropout(p, seed=seed, stream=len(layers)))

        add_dropout(input_dropout)
        for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            last = k == len(sizes) - 2
            layers.append(Linear(inputs, outputs, seed=rng, activation=None if last else activation, dtype=dtype))
            if not last:
                layers.append(ACTIVATION_LAYERS[activation]())
                add_dropout(dropout)
        super().__init__(*layers)
        self.sizes, self.activation = tuple(int(s) for s in sizes), activation
        self.dropout, self.input_dropout, self.seed = float(dropout), float(input_dropout), int(seed)
