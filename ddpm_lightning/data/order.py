"""Which image at which step: invariant 1 of the design.

A run sees one endless sequence of positions. Position p shows image p % n of the permutation of
epoch p // n, so the sequence runs on across epoch borders. Step k takes positions [kB, (k+1)B) for
batch size B; ranks and, within a rank, micro-batches take contiguous slices of them. Where training
stands is thus one number, the step.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import Stream, hash_indices

Indices = NDArray[np.int64]

NUM_BATCHES = 10**12
"""The length an endless loader states. Lightning fetches a batch ahead from a loader without one,
and loses it when training resumes."""


def permutation(num_images: int, seed: int, stream: Stream, index: int) -> Indices:
    """Shuffle [0, num_images): a pure function of the arguments, int64 [num_images]."""
    key = int(hash_indices(seed, stream, [index])[0])
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_images)


class GlobalOrder:
    """The order in which a run sees its images.

    Args:
        num_images: n, in one epoch; >= 1.
        seed: The run's seed.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self._num_images = num_images
        self._seed = seed
        self._permutations: dict[int, Indices] = {}

    def indices(self, positions: Indices) -> Indices:
        """Tell which image is at each position, int64 [N] in [0, n) for int64 [N] >= 0."""
        epochs, offsets = np.divmod(positions, self._num_images)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[offsets[here]]
        return indices

    def _permutation(self, epoch: int) -> Indices:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a batch at a border needs two, and none needs more
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = permutation(
                self._num_images, self._seed, Stream.ORDER, epoch
            )
        return self._permutations[epoch]


def check_batch_size(batch_size: int, world_size: int, accumulate: int) -> None:
    """Refuse a batch that ranks and micro-batches cannot share evenly.

    Raises:
        InputError: It is not a multiple of world_size * accumulate; names the nearest sizes.
    """
    parts = world_size * accumulate
    if batch_size % parts == 0:
        return
    below = batch_size // parts * parts
    sizes = [str(size) for size in (below, below + parts) if size]
    raise InputError(
        f"--data.batch_size {batch_size} does not divide by {world_size} ranks x {accumulate} "
        f"accumulated batches; the nearest sizes that do: {' and '.join(sizes)} (or give another "
        "number of --trainer.devices)"
    )


def micro_batch(
    index: int, batch_size: int, world_size: int, accumulate: int, rank: int
) -> Indices:
    """Positions of one rank's micro-batch, consecutive int64 [batch_size / parts].

    Args:
        index: Micro-batches since the start of training: step * accumulate + number in the step.
        batch_size: B, images per step over all ranks and micro-batches.
        world_size: Number of ranks; parts = world_size * accumulate divides B.
        accumulate: Micro-batches in a step.
        rank: In [0, world_size).
    """
    step, number = divmod(index, accumulate)
    size = batch_size // (world_size * accumulate)
    start = step * batch_size + (rank * accumulate + number) * size
    return np.arange(start, start + size)


class PositionSampler(Sampler[Indices]):
    """Yields one rank's micro-batches of positions for ever.

    Args:
        batch_size: See `micro_batch`.
        world_size: See `micro_batch`.
        accumulate: See `micro_batch`.
        rank: See `micro_batch`.
        start_step: Tells at which step to begin. Asked whenever iteration starts, so that a
            trainer with short epochs goes on in the sequence instead of seeing its beginning again.

    Raises:
        InputError: See `check_batch_size`.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        accumulate: int,
        rank: int,
        start_step: Callable[[], int],
    ) -> None:
        check_batch_size(batch_size, world_size, accumulate)
        self._batch_size = batch_size
        self._world_size = world_size
        self._accumulate = accumulate
        self._rank = rank
        self._start_step = start_step

    def __iter__(self) -> Iterator[Indices]:
        for index in itertools.count(self._start_step() * self._accumulate):
            yield micro_batch(
                index, self._batch_size, self._world_size, self._accumulate, self._rank
            )

    def __len__(self) -> int:
        return NUM_BATCHES


def validation_batches(
    num_images: int, batch_size: int, world_size: int, rank: int
) -> list[Indices]:
    """Deal [0, num_images) to the ranks in runs of `batch_size`, the last one perhaps shorter.

    Every image is in one batch of one rank. All ranks get as many batches, so that they meet in
    what they do together; the last one of a rank may thus be empty.

    Returns:
        The batches of `rank`, each int64 [<= batch_size].
    """
    stride = world_size * batch_size
    starts = [first + rank * batch_size for first in range(0, num_images, stride)]
    return [np.arange(start, max(start, min(start + batch_size, num_images))) for start in starts]
