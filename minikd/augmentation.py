"""Small changes of the inputs that leave their class as it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minikd import functional as F
from minikd.data import Dataset
from minikd.errors import ArgumentError, ShapeError
from minikd.kernels import run
from minikd.kernels.arrays import here
from minikd.nn import Module

__all__ = ["Shift"]


class Shift(Module):
    """Moves each image by up to `most` pixels down or up and right or left, in training only; another move each time.

    Parameters
    ----------
    shape : (height, width) of an image, which a row holds line by line.
    most : pixels in each direction; Hinton et al. jittered by up to two.
    fill : (height·width,) what comes in at the edges, on the scale of the inputs; None for 0.
    seed, stream : with the number of batches so far they decide the moves.

    Source: Hinton, Vinyals and Dean 2015, sec. 3.
    """

    def __init__(
        self, shape: tuple[int, int], most: int = 2, fill: np.ndarray | None = None, *, seed: int = 0, stream: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.most, self.fill = shape, int(most), None if fill is None else here.put(fill)
        self.seed, self.stream = int(seed), int(stream)
        self._step = np.zeros((), np.int64)

    @classmethod
    def of(cls, data: Dataset, most: int, seed: int) -> Shift:
        """For the normalised images of a data set; what comes in is black, a raw 0.

        Raises
        ------
        ShapeError : its rows are no images of one channel.
        """
        if len(data.feature_shape) != 2:
            got, fix = f"rows of shape {data.feature_shape}", "Give 0: only images (height, width) can be shifted."
            raise ShapeError("settings", "shift", expected="0 for data without images", got=got, fix=fix)
        height, width = data.feature_shape
        if most >= min(height, width):
            expected = f"below the images' smaller side, {min(height, width)} pixels"
            raise ArgumentError("settings", "shift", expected=expected, got=str(most))
        black = data.normalisation.apply(np.zeros((1, math.prod(data.feature_shape)), np.float32))[0]
        return cls((height, width), most, black, seed=seed)

    def forward(self, x: Any) -> Any:
        if not self.training or self.most == 0:
            return x
        run("advance", self._step)
        return F.shift_images(
            x, self.shape, self._step, most=self.most, fill=self.fill, seed=self.seed, stream=self.stream
        )
