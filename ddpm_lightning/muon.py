"""Muon: updates whose singular values are all about one, for weights that are matrices."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of s, s^3 and s^5 in the polynomial that each iteration applies to the singular values s."""

NUM_ITERATIONS = 5
"""Bring the singular values to about [0.7, 1.2] (Jordan et al. 2024); small ones stay smaller."""

UPDATE_RMS = 0.2
"""Root mean square of a matrix's update over the learning rate: Adam's (Liu et al. 2025)."""

ADAM_EPS = 1e-8


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values near one, by a Newton-Schulz iteration (Jordan et al. 2024).

    Args:
        matrix: Float [rows, columns]; zeros stay zeros.

    Returns:
        The same shape and dtype, with the same singular vectors.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if is_tall else matrix
    # in bfloat16 the iteration would diverge
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)  # no singular value is above one
    # Each iteration multiplies x by a polynomial of x @ x.T. All are polynomials of the first such
    # square, so that they commute, and x itself, which is wider, is multiplied once, at the end.
    square = x @ x.t()
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    factor = identity
    for iteration in range(NUM_ITERATIONS):
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c).add_(identity, alpha=a)
        factor = polynomial @ factor
        if iteration + 1 < NUM_ITERATIONS:
            square = polynomial @ square @ polynomial
    found: Tensor = (factor @ x).to(matrix.dtype)
    return found.t() if is_tall else found


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim > 1 and len(weight) > 1


class Muon(Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), and Adam for what is no matrix.

    A weight of two or more dimensions is a matrix with a row for each output, if it has more than
    one. The root mean square of its update is that which Adam's has (Liu et al. 2025, section 2.2),
    so that one learning rate serves all. Directions that only rounding fills are lifted, too: after
    20 steps in float32, weights that one and four micro-batches gave differ by 1e-4, where Adam's
    differ by 1e-5.

    Args:
        params: What to optimize.
        lr: Learning rate, at least 0.
        momentum: Share of a matrix's momentum that a step keeps, in [0, 1); Nesterov's.
        betas: Adam's, for biases and norms, in [0, 1). As torch's by default: on the command line
            the experiment's stay when the optimizer is changed, as its learning rate does.

    Raises:
        ValueError: A number out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr:g}")
        for name, share in (("momentum", momentum), ("betas", betas[0]), ("betas", betas[1])):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share:g}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take it; what has no gradient stays as it is.

        Args:
            closure: Computes the gradients anew and gives the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in filter(_is_matrix, weights):
                update = self._matrix_update(weight.grad, self.state[weight], group)
                weight.add_(update, alpha=-group["lr"])
            self._adam_step([weight for weight in weights if not _is_matrix(weight)], group)
        return loss

    @staticmethod
    def _matrix_update(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"]
        momentum.mul_(group["momentum"]).add_(gradient)
        matrix = gradient.add(momentum, alpha=group["momentum"]).flatten(1)
        # where all singular values are one, the root mean square is 1 / sqrt(max(rows, columns))
        scale = UPDATE_RMS * max(matrix.shape) ** 0.5
        return orthogonalize(matrix).mul(scale).view_as(gradient)

    def _adam_step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                zeros = partial(torch.zeros_like, weight)
                self.state[weight].update(step=torch.tensor(0.0), mean=zeros(), square=zeros())
        states = [self.state[weight] for weight in weights]
        first, second = group["betas"]
        adam(
            weights,
            [cast(Tensor, weight.grad) for weight in weights],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,  # they are many and small, so that calls of their own take longer
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=0.0,
            eps=ADAM_EPS,
            maximize=False,
        )
