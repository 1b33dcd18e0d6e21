"""Muon: updates whose singular values are all about one, for weights that are matrices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
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
    # Iterating on matrix @ matrix.T alone takes fewer products, but diverges in bfloat16.
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if is_tall else matrix
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)  # no singular value is above one
    for _ in range(NUM_ITERATIONS):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.t() if is_tall else x


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
            for weight in group["params"]:
                if weight.grad is not None:
                    is_matrix = weight.ndim > 1 and len(weight) > 1
                    update = self._matrix_update if is_matrix else self._adam_update
                    weight.add_(update(weight.grad, self.state[weight], group), alpha=-group["lr"])
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

    @staticmethod
    def _adam_update(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        first, second = group["betas"]
        mean: Tensor = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["step"])
        square: Tensor = state["square"].lerp_(gradient.square(), 1 - second)
        update: Tensor = mean / ((square / (1 - second ** state["step"])).sqrt() + ADAM_EPS)
        return update
