"""Optimizers over one flat arena of parameters, and the schedules of their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError, TapeError
from minikd.kernels import as_index, as_real, run
from minikd.kernels.arrays import here_too, host_copy, host_number, module_of
from minikd.kernels.recording import LAYOUT, note_check, note_constant, plain, recorder, refuse, refuse_reading
from minikd.nn import Arena
from minikd.tensor import Tensor

__all__ = ["SGD", "Adam", "AdamW", "Constant", "Cosine", "Optimizer", "Step"]


class Optimizer:
    """What all optimizers share: the arena, the learning rate and step count in buffers, and one kernel call a step.

    Parameters
    ----------
    params : the parameters that are trained together; they move into one arena.
    lr : learning rate; `opt.lr = …` writes the buffer that the kernel reads. In a compiled step it may be set to an
        argument that is a float64 array without axes.
    max_norm : after each step, scale the weights into each unit (rows of 2-D parameters) down to this L2 norm;
        None for no constraint.
    clip : before each step, scale all gradients together down to this L2 norm if theirs is larger; None leaves them as
        they are. `.grad` then shows what was scaled. As torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013), but by
        clip / norm without its 1e-6, and a norm that is infinite or NaN scales nothing: what is broken stays in sight.

    Attributes
    ----------
    lr : float.  steps : steps taken so far.

    Raises
    ------
    ArgumentError : a setting is out of its range, or a parameter belongs to another optimizer's arena.
    """

    kernel = ""
    state_names: tuple[str, ...] = ()

    def __init__(
        self, params: Iterable[Tensor], lr: float, max_norm: float | None, clip: float | None, **attrs: Any
    ) -> None:
        name = type(self).__name__
        _require(name, "lr", lr, lr > 0 and math.isfinite(lr), "a finite number above 0")
        _require(name, "max_norm", max_norm, max_norm is None or max_norm > 0, "above 0, or None")
        _require(name, "clip", clip, clip is None or clip > 0, "above 0, or None")
        self.arena = Arena.of(params)
        self.attrs = attrs
        self.max_norm = max_norm
        self.clip = clip
        self._lr = np.array(lr, np.float64)
        self._steps = np.zeros((), np.int64)
        xp = module_of(self.arena.values)
        self.state = {n: xp.zeros_like(self.arena.values) for n in self.state_names}

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "lr":  # which is a buffer that plans read
            LAYOUT.changed()

    @property
    def lr(self) -> float:
        refuse_reading("the learning rate")
        return float(self._lr)

    @lr.setter
    def lr(self, value: Any) -> None:
        self._check_lr(value)
        if recorder() is None:
            self._lr[...] = value
        else:
            if isinstance(value, np.ndarray):
                note_check(value, self._check_lr)
            run("set_scalar", self._lr, value if isinstance(value, np.ndarray) else float(value))

    def _check_lr(self, value: Any) -> None:
        host_number(type(self).__name__, "lr", value)
        value = float(plain(value)) if isinstance(value, np.ndarray) else value
        _require(type(self).__name__, "lr", value, 0 <= float(value) < math.inf, "a finite number from 0")

    @property
    def steps(self) -> int:
        refuse_reading("the number of steps")
        return int(self._steps)

    def zero_grad(self) -> None:
        """Forget all gradients; the next backward pass writes fresh ones without any filling."""
        for p in self.arena.parameters:
            p.zero_grad()

    def step(self) -> None:
        """Change the parameters once; a parameter that has no gradient counts as having a gradient of 0.

        Raises
        ------
        TapeError : no parameter has a gradient, so that backward was probably forgotten.
        """
        writing = recorder()
        if writing is not None:
            for name in ("arena", "attrs", "state", "max_norm", "clip"):
                writing.guard(self, name)
        parameters = self.arena.parameters
        if parameters[0].arena is not self.arena:
            name, fix = type(self).__name__, "Make a new optimizer for what was moved."
            expected, got = "in this optimizer's arena", "parameters of a model that was moved since"
            raise ArgumentError(name, "the parameters", expected=expected, got=got, fix=fix)
        without = [p for p in parameters if not p.has_gradient]
        if len(without) == len(parameters):
            raise TapeError(
                type(self).__name__,
                "the gradients",
                expected="there before step()",
                got="none",
                fix="Call loss.backward() first.",
            )
        for p in without:
            p.take_gradient(note_constant(module_of(p.array).zeros(p.shape, p.dtype)))
        if self.clip is not None:
            run("clip_norm", self.arena.gradients, limit=float(self.clip))
        run("advance", self._steps)
        run(self.kernel, *self._buffers(), **self.attrs)
        if self.max_norm is not None:
            for p in parameters:
                if p.ndim == 2:
                    run("max_norm", p.array, limit=float(self.max_norm))
        for p in parameters:
            p.changed_in_place()

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of what the steps so far have left: "lr", "steps" (int64), and each array of `state` by its name.

        On the host, wherever the parameters are.

        The arrays are flat, (k,), in the order of the arena; the parameters' values are not among them.
        """
        refuse_reading("the state of an optimizer")
        return {name: host_copy(buffer) for name, buffer in self._state_buffers().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: written in place, so that plans stay valid, and only if all of it fits.

        Raises
        ------
        ArgumentError : names are missing or unknown; a learning rate or number of steps that cannot be.
        ShapeError : a shape differs.  DTypeError : something else than numbers, or a number of steps with a fraction.
        """
        where, own = "load_state_dict", self._state_buffers()
        refuse("the state of an optimizer loaded in the step", "Load it before the step.")
        if set(own) != set(state):
            missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            expected = f"what {type(self).__name__} keeps: {', '.join(own)}"
            got = f"missing {missing or 'none'}, unknown {extra or 'none'}"
            fix = "Make the optimizer with the settings that it was saved with."
            raise ArgumentError(where, "state", expected=expected, got=got, fix=fix)
        values: dict[str, Any] = {}
        for name, buffer in own.items():
            values[name] = (as_index if name == "steps" else as_real)(where, name, state[name])
            if values[name].shape != buffer.shape:
                expected, got = f"of shape {buffer.shape}", f"shape {values[name].shape}"
                raise ShapeError(where, name, expected=expected, got=got)
        self._check_lr(float(values["lr"]))
        _require(where, "steps", int(values["steps"]), values["steps"] >= 0, "0 or above")
        for name, buffer in own.items():
            buffer[...] = here_too(values[name], buffer)

    def _state_buffers(self) -> dict[str, Any]:
        return {"lr": self._lr, "steps": self._steps, **self.state}

    def _buffers(self) -> list[Any]:
        """The step's buffers in the kernel's order: values and state, then gradients and hyperparameters."""
        return [self.arena.values, *self.state.values(), self.arena.gradients, self._lr]


def _require(where: str, argument: str, value: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise ArgumentError(where, argument, expected=expected, got=repr(value))


class SGD(Optimizer):
    """Stochastic gradient descent: d = g + λ·w;  v = μ·v + d;  w -= lr·v (Nesterov: lr·(d + μ·v)).

    Parameters
    ----------
    params, lr, max_norm, clip : see `Optimizer`.
    momentum : μ in [0, 1).  nesterov : look ahead along the velocity.  weight_decay : λ ≥ 0.

    Source: Sutskever et al. 2013, in torch.optim.SGD's form.
    """

    kernel = "sgd_step"

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = None,
        clip: float | None = None,
    ) -> None:
        _require("SGD", "momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _require("SGD", "nesterov", nesterov, not nesterov or momentum > 0, "used with a momentum above 0")
        _require("SGD", "weight_decay", weight_decay, weight_decay >= 0, "0 or above")
        self.state_names = ("v",) if momentum else ()
        attrs = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, lr, max_norm, clip, **attrs)

    def _buffers(self) -> list[Any]:
        return [self.arena.values, self.state.get("v"), self.arena.gradients, self._lr]


class Adam(Optimizer):
    """Adam: steps of the first moment over the root of the second, both corrected for their start at 0.

    Parameters
    ----------
    params, lr, max_norm, clip : see `Optimizer`; 1e-3 is the paper's choice.
    betas : decay of the two moments.  eps : added to the root.  weight_decay : λ ≥ 0, added to the gradient (L2).

    Source: Kingma and Ba 2015, algorithm 1.
    """

    kernel = "adam_step"
    state_names = ("m", "v")
    decoupled = False

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = None,
        clip: float | None = None,
    ) -> None:
        name = type(self).__name__
        _require(name, "betas", betas, all(0 <= b < 1 for b in betas) and len(betas) == 2, "two numbers in [0, 1)")
        _require(name, "eps", eps, eps > 0, "above 0")
        _require(name, "weight_decay", weight_decay, weight_decay >= 0, "0 or above")
        attrs = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, lr, max_norm, clip, decoupled=self.decoupled, **attrs)

    def _buffers(self) -> list[Any]:
        return [*super()._buffers(), self._steps]


class AdamW(Adam):
    """Adam whose weight decay shrinks the weights themselves and is not mixed into the moments; λ = 0.01 by default.

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_norm: float | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, max_norm=max_norm, clip=clip)


# --- schedules: what the base learning rate is multiplied by at step k of a run ---


@dataclass(frozen=True)
class Constant:
    """1 throughout, after a linear rise over the first `warmup` steps."""

    warmup: int = 0

    def __call__(self, step: int) -> float:
        return self.rise(step) * self.shape(step)

    def rise(self, step: int) -> float:
        """The warm-up's share: (step + 1) / warmup, then 1."""
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0

    def shape(self, step: int) -> float:
        """The schedule without its warm-up."""
        return 1.0


@dataclass(frozen=True)
class Step(Constant):
    """`factor` to the power of the number of times that `every` steps have passed."""

    every: int = 1000
    factor: float = 0.1

    def shape(self, step: int) -> float:
        return float(self.factor ** (step // self.every))


@dataclass(frozen=True)
class Cosine(Constant):
    """Half a cosine from 1 down to `final` over `total` steps (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

    total: int = 1000
    final: float = 0.0

    def shape(self, step: int) -> float:
        span = max(1, self.total - self.warmup)
        progress = min(1.0, max(0, step - self.warmup) / span)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[int], Constant]] = {
    # name: a schedule for a run of `total` steps
    "constant": lambda total: Constant(),
    "step": lambda total: Step(every=max(1, total // 3)),
    "cosine": lambda total: Cosine(total=total),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    # name: an optimizer with the defaults that this name stands for in a configuration
    "sgd": lambda params, lr, **options: SGD(params, lr, momentum=0.9, **options),
    "nesterov": lambda params, lr, **options: SGD(params, lr, momentum=0.9, nesterov=True, **options),
    "adam": Adam,
    "adamw": AdamW,
}
