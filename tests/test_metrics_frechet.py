"""The Frechet distance where it is known in closed form, and the sums that it is taken from."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from ddpm_lightning.metrics.frechet import Moments, MomentSums, frechet_distance
from ddpm_lightning.metrics.judge import Ranks
from ddpm_lightning.metrics.selftest import ThreadRanks

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def positive(num_features: int, seed: int) -> Tensor:
    """A covariance of full rank."""
    x = normal(num_features, 3 * num_features, seed=seed)
    return x @ x.T / (3 * num_features)


def moments_of(*parts: Tensor) -> Moments:
    """Moments of features that come in parts."""
    sums = MomentSums(parts[0].shape[1], CPU)
    for part in parts:
        sums.add(part)
    return sums.moments()


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(1000, mean, covariance)


def traces(a: Moments, b: Moments) -> float:
    return float(a.covariance.trace() + b.covariance.trace())


def distance_of_features(x: Tensor, y: Tensor) -> float:
    """The distance from features themselves: tr (A B)^(1/2) is the nuclear norm of X Y'."""
    x, y = x.double(), y.double()
    gap = x.mean(dim=0) - y.mean(dim=0)
    x = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    y = (y - y.mean(dim=0)) / math.sqrt(len(y) - 1)
    return float(gap @ gap + (x**2).sum() + (y**2).sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_features", [1, 2, 7, 64])
def test_distance_of_known_gaussians(num_features: int) -> None:
    """A = Q Q' and B = C A C, C symmetric: then (A B)^(1/2) has the trace of A C."""
    mean_a, mean_b = normal(2, num_features)
    a, c = positive(num_features, 1), positive(num_features, 2)
    b = c @ a @ c
    known = float(((mean_a - mean_b) ** 2).sum() + (a + b - 2 * a @ c).trace())
    ours = frechet_distance(gaussian(mean_a, a), gaussian(mean_b, b))
    assert ours == pytest.approx(known, rel=1e-12)


def test_distance_in_one_dimension() -> None:
    a = gaussian(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = gaussian(torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double())
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-15)


def test_distance_of_commuting_covariances() -> None:
    """With eigenvectors in common it is the distance of the standard deviations."""
    q, _ = torch.linalg.qr(normal(20, 20))
    std_a, std_b = normal(20, seed=1).abs(), normal(20, seed=2).abs()
    zero = torch.zeros(20, dtype=torch.float64)
    a, b = (gaussian(zero, q * std**2 @ q.T) for std in (std_a, std_b))
    assert frechet_distance(a, b) == pytest.approx(float(((std_a - std_b) ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("num_images", [2, 5, 40, 400])
def test_distance_to_itself_is_zero_and_it_is_symmetric(num_images: int) -> None:
    a, b = moments_of(normal(num_images, 40)), moments_of(normal(90, 40, seed=1))
    assert abs(frechet_distance(a, a)) < 1e-12 * traces(a, a)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 0.1


# --- singular covariances ------------------------------------------------------------------------


@pytest.mark.parametrize(("num_a", "num_b"), [(2, 2), (20, 30), (30, 500), (500, 30), (300, 400)])
@pytest.mark.parametrize("scale", [0, -3])
def test_fewer_images_than_features(num_a: int, num_b: int, scale: int) -> None:
    """Standard deviations from 1 down to 10^scale, and some features that never vary."""
    stds = torch.logspace(0, scale, 200, dtype=torch.float64)
    stds[50:60] = 0
    x, y = normal(num_a, 200) * stds, normal(num_b, 200, seed=1) * stds + 0.1
    a, b = moments_of(x), moments_of(y)
    known = distance_of_features(x, y)
    assert abs(frechet_distance(a, b) - known) < 1e-11 * traces(a, b)


def test_constant_features() -> None:
    a, b = moments_of(torch.ones(9, 5)), moments_of(torch.zeros(9, 5))
    assert frechet_distance(a, b) == pytest.approx(5, rel=1e-15)
    assert frechet_distance(a, moments_of(normal(9, 5))) > 0


# --- sums ----------------------------------------------------------------------------------------


def in_batches(x: Tensor, size: int) -> list[Tensor]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def splits(x: Tensor) -> Iterator[Sequence[Tensor]]:
    for size in (1, 7, 64, len(x)):
        yield in_batches(x, size)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        cuts = torch.randperm(len(x) - 1, generator=generator)[:6].sort().values + 1
        yield x.tensor_split(cuts)


@pytest.mark.parametrize("offset", [0, 100, 1e4])
def test_sums_do_not_depend_on_batches(offset: float) -> None:
    """Nor do features lose digits where their mean is far from 0."""
    x = (normal(150, 30) + offset).float()
    reference = x.double()
    for parts in splits(x):
        count, mean, covariance = moments_of(*parts)
        assert count == 150
        torch.testing.assert_close(mean, reference.mean(dim=0), rtol=1e-14, atol=1e-15)
        known = reference.T.cov()
        assert float((covariance - known).abs().max()) < 1e-13 * float(known.trace())


@pytest.mark.parametrize("offset", [0, 100])
def test_singular_covariances_far_from_zero(offset: float) -> None:
    x, y = (normal(50, 200, seed=seed).float() + offset for seed in (0, 1))
    a, b = moments_of(*in_batches(x, 8)), moments_of(*in_batches(y, 9))
    assert abs(frechet_distance(a, b) - distance_of_features(x, y)) < 1e-9 * traces(a, b)


@pytest.mark.parametrize("sizes", [[61], [40, 21], [60, 1], [30, 30, 1], [61, 0], [0, 20, 41]])
def test_sums_do_not_depend_on_ranks(sizes: list[int]) -> None:
    x = (normal(61, 20) + 10).float()
    whole = moments_of(*in_batches(x, 16))

    def task(share: Tensor, ranks: Ranks) -> Moments:
        sums = MomentSums(20, CPU)
        for batch in in_batches(share, 16):
            sums.add(batch)
        sums.reduce(ranks.sum)
        return sums.moments()

    shares = x.split(sizes)  # type: ignore[no-untyped-call]
    for count, mean, covariance in ThreadRanks.gather([partial(task, share) for share in shares]):
        assert count == 61
        torch.testing.assert_close(mean, whole.mean, rtol=1e-14, atol=0)
        error = float((covariance - whole.covariance).abs().max())
        assert error < 1e-13 * float(whole.covariance.trace())
