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
    """What moments are made from; it adds up over batches and ranks.

    Products are taken about the running mean (Chan, Golub, LeVeque 1979): about 0, the digits of
    features that lie far from it would be lost.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features, float [N, D], N >= 1."""
        x = features.double()
        mean = x.mean(dim=0)
        x = x - mean
        difference = mean - self.mean
        count = self.count + len(x)
        self.scatter.addmm_(x.T, x)
        self.scatter.addr_(difference, difference, alpha=self.count * len(x) / count)
        self.mean += difference * (len(x) / count)
        self.count = count

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add up over ranks by a function that does so for one tensor; all ranks must call."""
        count = int(add_up(torch.tensor(self.count, device=self.mean.device)))
        mean = add_up(self.mean * (self.count / max(count, 1)))
        difference = self.mean - mean
        self.scatter.addr_(difference, difference, alpha=self.count)
        self.count, self.mean, self.scatter = count, mean, add_up(self.scatter)

    def moments(self) -> Moments:
        """Give mean and covariance of everything added, at least two images."""
        covariance = self.scatter / (self.count - 1)
        return Moments(self.count, self.mean.cpu(), covariance.cpu())


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of the singular values of R' S, where A = R R' and B = S S'.
    That needs neither a root of a matrix nor roots of eigenvalues, whose rounding near 0 would be
    1e-8 and not 1e-16.

    Args:
        a: Moments of D features.
        b: Moments of D features.

    Returns:
        The distance; 0 for equal moments, but for rounding.
    """
    trace_of_root = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    difference = a.mean - b.mean
    traces = a.covariance.trace() + b.covariance.trace()
    return float(difference @ difference + traces - 2 * trace_of_root)


def _root(covariance: Tensor) -> Tensor:
    """Give R with R R' = covariance: Cholesky's factor, or where it is singular the eigenvectors'.

    Returns:
        float64 [D, K], where K leaves out the directions without variance.
    """
    # rounding leaves tiny values, of either sign, in the place of zeros
    precision = len(covariance) * torch.finfo(covariance.dtype).eps
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and root.diagonal().min() ** 2 > precision * covariance.diagonal().max():
        return root
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > precision * values[-1]
    root = vectors[:, kept] * values[kept].sqrt()
    return root
