"""Networks that learn together, each from the labels and from what the others say at the same moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from minikd.errors import ArgumentError
from minikd.kernels.recording import traced
from minikd.nn import Module
from minikd.objectives import Batch, Objective

__all__ = ["Peers"]


class Peers(Module):
    """Several networks in one training: online distillation, or deep mutual learning.

    Every peer is trained on the objective with the others, in turn, as its teachers: of K peers each takes the mean
    over the K - 1 others. What the others say is a constant. As one model the peers predict as the last of them does.

    Parameters
    ----------
    members : two networks at least, of the same inputs and classes; the last is the student.

    Source: Zhang, Xiang, Hospedales and Lu 2018, "Deep mutual learning", eq. 6 and 9; all peers take their steps at
    the same time here, with one forward pass each.
    """

    def __init__(self, members: Sequence[Module]) -> None:
        super().__init__()
        if len(members) < 2:
            raise ArgumentError("Peers", "members", expected="two networks at least", got=str(len(members)))
        self.members = tuple(members)

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((str(k), member) for k, member in enumerate(self.members))

    def forward(self, x: Any) -> Any:
        """The logits of the last peer."""
        return self.members[-1](x)

    def mutual_loss(self, objective: Objective, x: Any, target: Any) -> Any:
        """The sum of the peers' losses on inputs x and class ids target; each peer's gradient is its own loss's."""
        logits = [member(x) for member in self.members]
        said = [traced(z.array) for z in logits]
        losses = [
            objective(Batch(z, other, target)) for k, z in enumerate(logits) for j, other in enumerate(said) if j != k
        ]
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total if len(self.members) == 2 else total * (1.0 / (len(self.members) - 1))
