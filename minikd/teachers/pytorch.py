"""PyTorch networks as teachers: asked in evaluation mode without gradients, and left as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minikd.errors import ArgumentError, ShapeError
from minikd.teachers.teacher import LOGITS, Teacher, digest, library

ROWS_AT_A_TIME = 512


class TorchTeacher(Teacher):
    """A torch.nn.Module that gives scores (n, c).

    Parameters
    ----------
    shape : the shape of one row as the network takes it, such as (1, 28, 28); by default x goes in as it is.
    """

    def __init__(
        self,
        model: Any,
        *,
        gives: str = LOGITS,
        classes: int | None = None,
        shape: tuple[int, ...] | None = None,
        identity: str = "",
    ) -> None:
        super().__init__(gives, classes, identity)
        self.model, self.shape = model, shape

    def _answer(self, x: Any, rows: Any) -> Any:
        torch = library("torch", "test-teachers")
        place = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(0))
        x = reshaped(type(self).__name__, x, self.shape)
        pieces = []
        with _evaluating(self.model), torch.no_grad():
            for start in range(0, max(len(x), 1), ROWS_AT_A_TIME):
                # A copy, since PyTorch neither takes read-only arrays quietly nor promises to leave its input alone.
                piece = torch.from_numpy(np.array(x[start : start + ROWS_AT_A_TIME], np.float32, order="C"))
                found = self.model(piece.to(place.device, place.dtype))
                pieces.append(self._array(torch, found))
        return np.concatenate(pieces)

    def _array(self, torch: Any, found: Any) -> np.ndarray:
        found = getattr(found, "logits", found)  # the outputs of transformer libraries are records with this field
        if not isinstance(found, torch.Tensor):
            fix = "Wrap the network in a module whose forward returns the scores alone."
            got = type(found).__name__
            raise ArgumentError(self._name, "the output", expected="one tensor of scores", got=got, fix=fix)
        found = found if found.dtype == torch.float64 else found.float()
        return np.asarray(found.cpu().numpy())

    def _identity(self) -> str:
        torch = library("torch", "test-teachers")
        parts: list[tuple[str, Any]] = [("modules", repr(self.model))]
        for name, value in self.model.state_dict().items():
            if isinstance(value, torch.Tensor):
                data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                parts.append((f"{name} {value.dtype} {tuple(value.shape)}", data))
        return f"torch:{digest(parts)}" + (f" shape {self.shape}" if self.shape else "") + f" gives {self.gives}"


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode in all parts, and each part's own mode again afterwards, whatever happens."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def reshaped(where: str, x: Any, shape: tuple[int, ...] | None) -> Any:
    """x (n, …) with rows of this shape, or x itself where none is given; ShapeError where it does not fit."""
    if shape is None or x.shape[1:] == tuple(shape):
        return x
    if x[:1].size != int(np.prod(shape)) * len(x[:1]):
        fix = "Say shape=… if the rows' values are to be arranged in another way."
        raise ShapeError(where, "x", expected=f"rows of shape {tuple(shape)}", got=f"rows of {x.shape[1:]}", fix=fix)
    return x.reshape(len(x), *shape)
