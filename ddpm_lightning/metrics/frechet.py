"""The Frechet distance of two sets of features (Heusel et al. 2017, Eq. 6), in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and covariance of features."""

    num_images: int
    mean: Tensor  # float64 [D]
    covariance: Tensor  # float64 [D, D], divided by num_images - 1


class MomentSums:
    """Sums that moments are made from; they add up over batches and ranks."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features, float [N, D]."""
        x = features.double()
        self.count += len(x)
        self.sum += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add up over ranks by a function that does so for one tensor; all ranks must call."""
        self.count, self.sum, self.outer = map(add_up, (self.count, self.sum, self.outer))

    def moments(self) -> Moments:
        """Give mean and covariance of everything added, at least two images."""
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments(int(self.count), mean.cpu(), covariance.cpu())


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of A B, which are those of the
    symmetric R' B R, where A = R R'. That needs no root of a matrix, and no complex numbers.

    Args:
        a: Moments of D features.
        b: Moments of D features.

    Returns:
        The distance; 0 for equal moments but for rounding, which is about 1e-8 of the traces where
        fewer images than features make the covariances singular.
    """
    root = _root(a.covariance)
    eigenvalues = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()
    difference = a.mean - b.mean
    traces = a.covariance.trace() + b.covariance.trace()
    return float(difference @ difference + traces - 2 * trace_of_root)


def _root(covariance: Tensor) -> Tensor:
    """Give R with R R' = covariance: Cholesky's factor, or where it is singular the eigenvectors'.

    Returns:
        float64 [D, K], where K leaves out the directions without variance.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return root
    values, vectors = torch.linalg.eigh(covariance)
    # rounding leaves tiny values, of either sign, in the place of zeros
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = vectors[:, kept] * values[kept].sqrt()
    return root
