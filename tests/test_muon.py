"""Muon: orthogonalized momentum for matrices, Adam for the rest."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning.callbacks import EMA, Checkpoints
from ddpm_lightning.muon import COEFFICIENTS, NUM_ITERATIONS, UPDATE_RMS, Muon, orthogonalize
from tests.training import assert_same_training, make_data, make_trainer, tiny_module

SHAPES = [(6, 40), (40, 6), (9, 9)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_svd(matrix: Tensor) -> Tensor:
    """Apply the polynomial to the singular values themselves."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(NUM_ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    found: Tensor = u @ torch.diag(s) @ v
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    found = orthogonalize(matrix)
    torch.testing.assert_close(found, by_svd(matrix), atol=1e-10, rtol=0)
    values = torch.linalg.svdvals(found)
    if shape != (9, 9):  # a square one has a singular value near zero
        assert 0.68 < values.min() <= values.max() < 1.21
    torch.testing.assert_close(orthogonalize(1e-30 * matrix), found, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "shape"), [*product((torch.float32, torch.bfloat16, torch.float16), SHAPES)]
)
def test_rounding_keeps_them_bounded(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Of a matrix whose singular values span eight orders of magnitude, too."""
    u, s, v = torch.linalg.svd(randn(*shape), full_matrices=False)
    spread = u @ torch.diag(torch.logspace(0, -8, len(s), dtype=torch.float64)) @ v
    found = orthogonalize(spread.to(dtype))
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert 0.6 < values.max() < 1.3


def test_zeros_stay_zeros() -> None:
    assert orthogonalize(torch.zeros(3, 5)).equal(torch.zeros(3, 5))


@pytest.mark.parametrize(("momentum", "shape"), [*product((0.0, 0.9), SHAPES)])
def test_matrices_follow_nesterovs_momentum(momentum: float, shape: tuple[int, int]) -> None:
    weight = nn.Parameter(randn(*shape))
    expected, kept = weight.detach().clone(), torch.zeros(*shape, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, momentum=momentum)
    for step in range(3):
        weight.grad = randn(*shape, seed=step + 1)
        optimizer.step()
        kept = momentum * kept + weight.grad
        update = by_svd(weight.grad + momentum * kept)
        expected -= 0.1 * UPDATE_RMS * max(shape) ** 0.5 * update
        torch.testing.assert_close(weight.detach(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_torchs_own_takes_the_same_steps(shape: tuple[int, int]) -> None:
    """It rounds to bfloat16 between; and it takes matrices alone."""
    ours, theirs = (nn.Parameter(randn(*shape).float()) for _ in range(2))
    start = ours.detach().clone()
    pair = (
        Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        ours.grad = theirs.grad = randn(*shape, seed=step + 1).float()
        for optimizer in pair:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_a_convolution_is_the_matrix_of_its_outputs() -> None:
    kernel = nn.Parameter(randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    pair = Muon([kernel]), Muon([matrix])
    for step in range(2):
        kernel.grad = randn(8, 4, 3, 3, seed=step + 1)
        matrix.grad = kernel.grad.flatten(1)
        for optimizer in pair:
            optimizer.step()
    assert kernel.flatten(1).equal(matrix)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.999)])
def test_the_rest_takes_adams_steps(betas: tuple[float, float]) -> None:
    shapes = (7,), (1, 7), (1, 4, 3, 3), ()
    ours, theirs = ([nn.Parameter(randn(*shape)) for shape in shapes] for _ in range(2))
    pair = Muon(ours, lr=0.1, betas=betas), torch.optim.Adam(theirs, lr=0.1, betas=betas)
    for step in range(5):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = their.grad = randn(*our.shape, seed=step + 1)
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_what_has_no_gradient_stays() -> None:
    weights = [nn.Parameter(randn(3, 5)), nn.Parameter(randn(5))]
    before = copy.deepcopy(weights)
    optimizer = Muon(weights)
    optimizer.step()
    assert all(map(torch.equal, weights, before))
    assert not optimizer.state


def test_a_closure_computes_the_gradients() -> None:
    weight = nn.Parameter(randn(3, 5))
    before = weight.detach().clone()

    def closure() -> float:
        loss = weight.square().sum()
        (weight.grad,) = torch.autograd.grad(loss, weight)
        return float(loss.detach())

    loss = Muon([weight]).step(closure)
    assert loss == pytest.approx(float(before.square().sum()))
    assert weight.square().sum() < before.square().sum()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1"),
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\), got 1"),
        ({"betas": (0.9, -0.1)}, r"betas must lie in \[0, 1\), got -0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(option: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(2, 2))], **option)  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_to_the_last_bit(pictures: Path, tmp_path: Path) -> None:
    def train(name: str, steps: int, resume: Path | None = None) -> Path:
        trainer = make_trainer(tmp_path / name, EMA(0.9), Checkpoints(), max_steps=steps)
        trainer.fit(tiny_module(optimizer=Muon), make_data(pictures), ckpt_path=resume)
        return tmp_path / name / "checkpoints/last.ckpt"

    whole, first = train("whole", 6), train("first", 3)
    assert_same_training(train("resumed", 6, resume=first), whole)
