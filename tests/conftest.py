"""What several test files share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden.npz"


class Golden:
    """The numbers of golden.npz as float64 tensors; golden.md beside it explains them."""

    def __init__(self) -> None:
        with np.load(GOLDEN) as arrays:
            self._arrays: dict[str, NDArray[np.float64]] = dict(arrays)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[key])

    @staticmethod
    def net(x: Tensor, t: Tensor) -> Tensor:
        """The analytic network that the reference numbers were made with."""
        t = t.to(x.dtype).reshape(-1, 1, 1, 1)
        return 0.3 * x * torch.cos(t / 1000) + 0.1 * torch.sin(t / 100)

    def chain_noise(self, index: int) -> Tensor:
        """The noise that the reference chains use at one index."""
        angle = torch.tensor(float(index), dtype=torch.float64)
        return self["noise_2"] * torch.cos(angle) + self["noise"] * torch.sin(angle)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()
