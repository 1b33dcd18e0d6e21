"""Exact nearest neighbours, by brute force."""

from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """For each of N queries its k nearest rows, the nearest first."""

    distances: Tensor  # Euclidean, float64 [N, k]
    indices: Tensor  # of the rows in the order in which they were added, int64 [N, k]

    def in_grey_levels(self, num_values: int) -> "Nearest":
        """Make distances between images of so many values root mean square differences."""
        return self._replace(distances=self.distances / num_values**0.5)


class NeighbourSearch:
    """Finds the rows that are nearest to each query while the rows pass by in batches.

    Distances come from matrix products in float64, so those between uint8 images are exact. Of
    rows that are equally near, those added first are taken.

    Args:
        queries: [N, D] of any dtype.
        num_neighbours: k, at least 1.
    """

    def __init__(self, queries: Tensor, num_neighbours: int) -> None:
        self._queries = queries.double()
        self._squares = self._queries.square().sum(dim=1, keepdim=True)
        self._num_neighbours = num_neighbours
        self._num_rows = 0
        self._distances = self._squares[:, :0]  # squared
        self._indices = self._distances.long()

    def add(self, rows: Tensor) -> None:
        """Look at more rows, [M, D] on the queries' device."""
        rows = rows.double()
        products = self._queries @ rows.T
        # |a - b|^2 = |a|^2 - 2 ab + |b|^2, which rounding may make negative
        distances = (self._squares - 2 * products + rows.square().sum(dim=1)).clamp(min=0)
        indices = torch.arange(len(rows), device=rows.device) + self._num_rows
        self._num_rows += len(rows)
        distances = torch.cat([self._distances, distances], dim=1)
        indices = torch.cat([self._indices, indices.expand(len(distances), -1)], dim=1)
        distances, order = distances.sort(dim=1, stable=True)
        self._distances = distances[:, : self._num_neighbours]
        self._indices = indices.gather(1, order)[:, : self._num_neighbours]

    def finish(self) -> Nearest:
        """Give what was found; k is the number of rows where those are fewer."""
        return Nearest(self._distances.sqrt(), self._indices)
