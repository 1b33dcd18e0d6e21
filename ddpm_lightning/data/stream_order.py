"""Which image of a stream at which position: blocks, lanes and windows.

Blocks are what is read at once. The blocks of epoch e, shuffled and laid end to end, are a sequence
of its N images. It is cut into as many stretches as there are lanes, in order. A batch of B
positions is divided among the lanes likewise: lane l fills slots [l c, (l + 1) c) with c = B / L.
Its stretch is exactly as long as the number of its slots among the positions [e N, (e + 1) N) of
the epoch. Thus every image has one position in each epoch, whatever the sizes of the blocks, and
an epoch may end anywhere in a batch. Within a lane, windows of whole blocks are shuffled.

A contiguous slice of every batch is thus fed by the same few lanes, and these by a stretch of the
blocks: this is what lets a rank, or a worker, read its share alone. All of it is a function of
(seed, position): where training stands is one number, as for decoded images (see `order`).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ddpm_lightning.data.order import Indices, permutation
from ddpm_lightning.randomness import Stream

MAX_LANES = 64
WINDOW_BLOCKS = 128
WINDOW_BYTES = 2**28
WINDOW_IMAGES = 2**15
"""What the windows of all lanes hold at most (but a block per lane): more would mix no better."""

_BLOCKS_PER_LANE = 8
"""At least. A lane's first and last block may be its neighbours' too, and are then read twice: so
an eighth more is read at most."""


class Part(NamedTuple):
    """Images [start, stop) of a block."""

    block: int
    start: int
    stop: int


class Window(NamedTuple):
    """Images [start, stop) of an epoch's sequence, which a lane shows in shuffled order."""

    epoch: int
    lane: int
    start: int
    stop: int


class Run(NamedTuple):
    """Some positions that show images of one window.

    Attributes:
        window: The window.
        where: Which of the positions asked for.
        offsets: How far the lane is in the window at each of them, int64.
    """

    window: Window
    where: slice
    offsets: Indices


class _Epoch(NamedTuple):
    """An epoch's sequence.

    Attributes:
        blocks: In their order, int64 [num_blocks].
        ends: Where each begins, and N, int64 [num_blocks + 1].
        borders: Where each group of blocks that are shuffled together begins, and N.
    """

    blocks: Indices
    ends: Indices
    borders: Indices


def choose_lanes(
    batch_size: int, num_blocks: int, block_bytes: float, block_images: float
) -> tuple[int, int]:
    """Choose how many lanes there are, and how many blocks a window has.

    Neither depends on the number of ranks or workers. The lanes divide the batch, so that each has
    as many slots; ranks that divide the lanes share none.

    Args:
        batch_size: B.
        num_blocks: Of the training set.
        block_bytes: Their mean size in memory.
        block_images: Their mean number of images.
    """
    by_bytes = int(WINDOW_BYTES // max(1.0, block_bytes))
    most = max(1, min(MAX_LANES, by_bytes, num_blocks // _BLOCKS_PER_LANE))
    num_lanes = max(lanes for lanes in range(1, most + 1) if batch_size % lanes == 0)
    held = min(WINDOW_BLOCKS, by_bytes, int(WINDOW_IMAGES // block_images))
    return num_lanes, max(1, held // num_lanes)


class StreamOrder:
    """The order in which a run sees the images of a stream.

    Args:
        sizes: Number of images in each block, all >= 1.
        batch_size: B, images per step over all ranks.
        num_lanes: L; divides B.
        window_blocks: Blocks that are shuffled together.
        seed: The run's seed.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        num_lanes: int,
        window_blocks: int,
        seed: int,
    ) -> None:
        assert batch_size % num_lanes == 0
        self.num_images = sum(sizes)
        self.slots_per_lane = batch_size // num_lanes
        self._sizes = np.array(sizes, dtype=np.int64)
        self._batch_size = batch_size
        self._window_blocks = window_blocks
        self._seed = seed
        self._epochs: dict[int, _Epoch] = {}

    def runs(self, positions: Indices) -> list[Run]:
        """Tell which windows show the images at `positions`, int64 [N] >= 0, and how far in."""
        epochs = positions // self.num_images
        lanes = positions % self._batch_size // self.slots_per_lane
        places = np.asarray(
            self._lane_start(epochs, lanes) + self._index_in_lane(positions, epochs, lanes)
        )
        groups, starts, stops = np.empty((3, *positions.shape), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            borders = self._epoch(epoch).borders
            groups[here] = _interval(borders, places[here])
            starts[here], stops[here] = borders[groups[here]], borders[groups[here] + 1]
        starts = np.maximum(starts, self._lane_start(epochs, lanes))
        stops = np.minimum(stops, self._lane_start(epochs, lanes + 1))
        keys = np.stack([epochs, lanes, groups])
        cuts = np.flatnonzero((np.diff(keys) != 0).any(axis=0)) + 1
        edges = [0, *cuts.tolist(), len(positions)]
        runs = []
        for first, last in pairwise(edges):
            if first < last:  # else there are no positions
                window = Window(*(int(each[first]) for each in (epochs, lanes, starts, stops)))
                runs.append(Run(window, slice(first, last), places[first:last] - window.start))
        return runs

    def indices(self, positions: Indices) -> Indices:
        """Tell which image is at each position, int64 [N]: its place among all, block by block."""
        firsts = np.cumsum(self._sizes) - self._sizes
        indices = np.empty_like(positions)
        for run in self.runs(positions):
            here = [firsts[b] + np.arange(start, stop) for b, start, stop in self.parts(run.window)]
            indices[run.where] = np.concatenate(here)[self.shuffle(run.window)[run.offsets]]
        return indices

    def parts(self, window: Window) -> list[Part]:
        """List the parts of blocks that a window is made of, in its unshuffled order."""
        blocks, ends, _ = self._epoch(window.epoch)
        first, last = _interval(ends, np.array([window.start, window.stop - 1])).tolist()
        return [
            Part(
                int(blocks[index]),
                int(max(window.start, ends[index]) - ends[index]),
                int(min(window.stop, ends[index + 1]) - ends[index]),
            )
            for index in range(first, last + 1)
        ]

    def shuffle(self, window: Window) -> Indices:
        """Give the order in which a window's images are shown, int64 [its length]."""
        place = window.epoch * self.num_images + window.start  # no other window's
        return permutation(window.stop - window.start, self._seed, Stream.WINDOW, place)

    def following(self, window: Window) -> Window:
        """Give the window that a lane shows after this one."""
        epoch, lane, _, stop = window
        if stop < self._lane_start(epoch, lane + 1):
            return self._window(epoch, lane, stop)
        return self._window(epoch + 1, lane, int(self._lane_start(epoch + 1, lane)))

    def _window(self, epoch: int, lane: int, place: int) -> Window:
        """Find the window of a lane that holds a place of the epoch's sequence."""
        borders = self._epoch(epoch).borders
        group = int(_interval(borders, place))
        start = max(int(borders[group]), int(self._lane_start(epoch, lane)))
        stop = min(int(borders[group + 1]), int(self._lane_start(epoch, lane + 1)))
        return Window(epoch, lane, start, stop)

    def _slots_before(self, position: Indices | int, lane: Indices | int) -> Indices | int:
        """Count the positions in [0, position) that belong to lanes [0, lane)."""
        steps, rest = np.divmod(position, self._batch_size)
        slots = np.multiply(lane, self.slots_per_lane)
        count: Indices = steps * slots + np.minimum(rest, slots)
        return count

    def _lane_start(self, epoch: Indices | int, lane: Indices | int) -> Indices | int:
        """Tell where a lane's stretch of the epoch's sequence begins."""
        begin = np.multiply(epoch, self.num_images)
        return self._slots_before(begin + self.num_images, lane) - self._slots_before(begin, lane)

    def _index_in_lane(self, positions: Indices, epochs: Indices, lanes: Indices) -> Indices | int:
        """Count what each position's lane has shown in the epoch before it."""
        begin = epochs * self.num_images
        ours = self._slots_before(positions, lanes + 1) - self._slots_before(positions, lanes)
        return ours - self._slots_before(begin, lanes + 1) + self._slots_before(begin, lanes)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # at a border two are needed, and never more
                del self._epochs[min(self._epochs)]
            blocks = permutation(len(self._sizes), self._seed, Stream.ORDER, epoch)
            ends = np.concatenate([[0], np.cumsum(self._sizes[blocks])])
            borders = np.append(ends[: -1 : self._window_blocks], self.num_images)
            self._epochs[epoch] = _Epoch(blocks, ends, borders)
        return self._epochs[epoch]


def _interval(edges: Indices, values: Indices | int) -> Indices:
    """Tell in which interval [edges[i], edges[i + 1]) each value lies."""
    found: Indices = np.searchsorted(edges, values, side="right") - 1
    return found
