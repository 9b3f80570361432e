"""What is measured on a GPU: kernels at the sizes that a GPU is bought for, and whole steps, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from minikd.bench.cases import KERNELS, PARAMETERS, Kernel, shape_text
from minikd.bench.steps.cases import STEPS, Step
from minikd.ops import Shape

# From what fits every cache to the batch of a language model; the first is what `--quick` measures.
ROWS: tuple[Shape, ...] = ((1024, 1000), (128, 10), (4096, 100), (4096, 32000))
MEASURED: dict[str, tuple[Shape, ...]] = {
    "distillation_loss": ROWS,
    "cross_entropy": ROWS,
    "softmax": ROWS,
    "adam_step": PARAMETERS,
}
GPU_STEPS: dict[str, Step] = {
    name: dataclasses.replace(STEPS[name], steps=50)
    for name in ("adam-784-1200-1200-10", "distil-784-800-800-10-stored")
}
# Losses of whole steps: what float32 sums in another order make of the first of them.
STEP_TOLERANCE = 1e-4


@dataclass(frozen=True)
class GpuCase:
    """A kernel at one shape, or a step."""

    name: str
    shape: Shape = ()

    @property
    def subject(self) -> Kernel | Step:
        """What contenders bind: it makes inputs, and says what is right and how far off a result is."""
        return GPU_STEPS[self.name] if self.name in GPU_STEPS else KERNELS[self.name]

    @property
    def is_step(self) -> bool:
        return self.name in GPU_STEPS

    @property
    def label(self) -> str:
        """The case for people: "softmax, 128 × 10"."""
        if self.is_step:
            return GPU_STEPS[self.name].label
        return f"{self.name}, {' × '.join(f'{size:,}' for size in self.shape)}"

    @property
    def bytes_moved(self) -> int:
        """The least number of bytes that float32 buffers cost; 0 for a step, which multiplies besides.

        A GPU writes without reading first: the distillation loss with its gradient is 12 bytes an element.
        """
        if self.is_step:
            return 0
        kernel = KERNELS[self.name]
        return int(4 * (kernel.reads + kernel.writes + 2 * kernel.updates) * np.prod(self.shape))

    def make_inputs(self) -> dict[str, Any]:
        """The inputs, the same in every process."""
        return GPU_STEPS[self.name].make_inputs() if self.is_step else KERNELS[self.name].make_inputs(self.shape)


CASES = (
    *(GpuCase(name, shape) for name, shapes in MEASURED.items() for shape in shapes),
    *(GpuCase(name) for name in GPU_STEPS),
)
NAMES = tuple(dict.fromkeys(case.name for case in CASES))
SHAPES = {shape_text(case.shape): case.shape for case in CASES if case.shape}


def chosen(names: list[str] | None, shapes: list[str] | None, quick: bool) -> list[GpuCase]:
    """The cases with one of these names and shapes; all where none is named; quick takes the first shape of each."""
    found = [case for case in CASES if not names or case.name in names]
    if shapes:
        return [case for case in found if case.shape and shape_text(case.shape) in shapes]
    if quick:
        return [case for case in found if case == next(c for c in CASES if c.name == case.name)]
    return found
