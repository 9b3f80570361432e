"""Teachers that are Python already: a network of our own, and a plain function of an array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import numpy as np

from minikd.errors import ArgumentError
from minikd.nn import Module
from minikd.teachers.teacher import LOGITS, Teacher, digest


class ModelTeacher(Teacher):
    """A network of minikd, on raw features: its own normalisation is applied, and dropout is off."""

    def __init__(
        self, model: Module, *, classes: int | None = None, class_names: Any = None, identity: str = ""
    ) -> None:
        own = model.class_names
        if class_names is not None and own is not None and tuple(class_names) != tuple(own):
            fix = "Take a teacher that was trained on the same classes in the same order."
            expected = f"the classes {', '.join(class_names)}"
            raise ArgumentError("as_teacher", "the model's classes", expected=expected, got=", ".join(own), fix=fix)
        super().__init__(LOGITS, classes, identity)
        self.model = model

    def _answer(self, x: Any, rows: Any) -> Any:
        return self.model.logits(x)

    def _identity(self) -> str:
        """What changes an answer: the parts, the parameters as they are now, the scale of the features."""
        scale = self.model.normalisation
        parts: list[tuple[str, Any]] = [(name, _setting(m)) for name, m in self.model.named_modules()]
        parts += self.model.state_dict().items()
        parts += [] if scale is None else [("mean", scale.mean), ("deviation", scale.deviation)]
        return f"minikd:{digest(parts)}"


def _setting(module: Module) -> str:
    """A part's kind and its settings in words (its activation, for one); numbers only steer dropout and training."""
    return f"{type(module).__name__} {sorted((k, v) for k, v in vars(module).items() if isinstance(v, str))}"


class FunctionTeacher(Teacher):
    """A function from raw features (n, k) to scores (n, c).

    Its identity is its name and what can be seen of it: bytecode, defaults, and the arrays and numbers that it closes
    over. What it reads elsewhere (a file, a global) cannot be seen: `identity=` names such a teacher.
    """

    def __init__(
        self, function: Callable[..., Any], *, gives: str = LOGITS, classes: int | None = None, identity: str = ""
    ) -> None:
        super().__init__(gives, classes, identity)
        self.function = function

    def _answer(self, x: Any, rows: Any) -> Any:
        return self.function(x)

    def _identity(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"function {self.function.__module__}.{name}:{digest(_visible(self.function))} gives {self.gives}"


def _visible(function: Any) -> Iterator[tuple[str, Any]]:
    """What decides a function's answers, as far as it can be seen."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return
    yield from _code(code)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    for value in (*cells, *(function.__defaults__ or ())):
        if isinstance(value, np.ndarray | str | int | float | tuple | None):
            yield "value", value


def _code(code: CodeType) -> Iterator[tuple[str, Any]]:
    yield "code", code.co_code
    yield "names", " ".join(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif not isinstance(constant, frozenset):  # whose order differs between processes
            yield "constant", repr(constant)
