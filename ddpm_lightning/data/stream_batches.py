"""Batches of a stream: windows read ahead, and each worker reading what its own lanes need."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from ddpm_lightning.data.batches import Batch, mirror_half
from ddpm_lightning.data.order import NUM_BATCHES, Indices, PositionSampler
from ddpm_lightning.data.stream_blocks import Items
from ddpm_lightning.data.stream_files import RETRY_DELAYS, StreamError
from ddpm_lightning.data.stream_images import StreamImages, read_window
from ddpm_lightning.data.stream_order import Part, Run, StreamOrder, Window, choose_lanes
from ddpm_lightning.errors import InputError, SharedError
from ddpm_lightning.images import Pixels

_NUM_READERS = 8  # threads of a process that wait for files
_NUM_AHEAD = 4  # batches: with 2, workers waited for each other, and gave a tenth fewer images


class _Contents(NamedTuple):
    """What is in a window."""

    parts: list[Part]
    shuffled: Indices
    items: Items


class WindowReader:
    """Reads the windows that positions need, and the next ones before they are needed.

    Of each lane it holds the window that it is in, and the following one once half of that has
    been shown.

    Args:
        images: The training set.
        order: Its order.
    """

    def __init__(self, images: StreamImages, order: StreamOrder) -> None:
        self._images = images
        self._order = order
        self._held: dict[int, dict[Window, Callable[[], _Contents]]] = {}
        # Only in the process that reads; they keep none from ending (an executor's would).
        self._threads: ThreadPool | None = None

    def read(self, positions: Indices) -> Pixels:
        """Give the images at `positions`, int64 [n], as uint8 [n, C, H, W].

        Raises:
            StreamError: They cannot be read, now and after many attempts, or one is broken.
        """
        runs = self._order.runs(positions)
        for run in runs:  # all at once: a server's answer takes its time
            self._begin(run.window)
        pixels = np.empty((len(positions), *self._images.image_shape), dtype=np.uint8)
        for run in runs:
            contents = self._finish(run.window)
            picks = contents.shuffled[run.offsets]
            self._images.decode(
                contents.items,
                picks,
                pixels[run.where],
                partial(self._name, contents),
            )
        for run in {run.window.lane: run for run in runs}.values():
            self._move_on(run)
        return pixels

    @property
    def num_held(self) -> int:
        """Images in the windows that are held, those that are being read too."""
        return sum(w.stop - w.start for held in self._held.values() for w in held)

    def _begin(self, window: Window) -> None:
        """Start reading a window, unless that has been done."""
        held = self._held.setdefault(window.lane, {})
        if window not in held:
            if self._threads is None:
                self._threads = ThreadPool(_NUM_READERS)
                # also when Python ends, while it still can
                weakref.finalize(self, self._threads.terminate)
            parts = self._order.parts(window)
            shuffled = self._order.shuffle(window)
            held[window] = self._threads.apply_async(self._contents, (parts, shuffled, ())).get

    def _contents(self, parts: list[Part], shuffled: Indices, delays: Sequence[float]) -> _Contents:
        return _Contents(parts, shuffled, read_window(self._images.items.pieces, parts, delays))

    def _finish(self, window: Window) -> _Contents:
        """Wait for a window; where reading it failed, read it here, as often as it takes.

        The threads try once only: waiting belongs where a signal can end it.
        """
        held = self._held[window.lane]
        try:
            return held[window]()
        except StreamError:
            parts, shuffled = self._order.parts(window), self._order.shuffle(window)
            contents = self._contents(parts, shuffled, RETRY_DELAYS)
            held[window] = lambda: contents
            return contents

    def _move_on(self, run: Run) -> None:
        """Drop what a lane has shown, and begin with what it will show."""
        window, held = run.window, self._held[run.window.lane]
        *_, newest = held
        if newest == window and 2 * int(run.offsets[-1]) >= window.stop - window.start - 1:
            newest = self._order.following(window)
            self._begin(newest)
        self._held[window.lane] = {one: held[one] for one in (window, newest)}

    def _name(self, contents: _Contents, pick: int) -> str:
        for part in contents.parts:
            if pick < part.stop - part.start:
                return self._images.items.pieces[part.block].name(part.start + pick)
            pick -= part.stop - part.start
        raise AssertionError("no such image")


class StreamBatches(Dataset[Batch]):
    """Images of a stream by position in the run's global order (see `stream_order`).

    Args:
        images: The training set.
        batch_size: Images per step over all ranks; the order depends on it.
        seed: The run's seed.
        flip: Mirror every second image, on average, left to right.
    """

    def __init__(self, images: StreamImages, batch_size: int, seed: int, flip: bool) -> None:
        pieces = images.items.pieces
        sizes = [len(piece) for piece in pieces]
        num_bytes = sum(p.block.num_bytes * len(p) / p.block.num_images for p in pieces)
        lanes, blocks = choose_lanes(
            batch_size, len(pieces), num_bytes / len(pieces), sum(sizes) / len(pieces)
        )
        self.order = StreamOrder(sizes, batch_size, lanes, blocks, seed)
        self.reader = WindowReader(images, self.order)
        self._seed = seed
        self._flip = flip

    def __getitems__(self, positions: Indices) -> Batch | InputError:
        """Make the batch of `positions`, or say why there is none.

        A worker's exceptions would reach the user with the worker's traceback in them.
        """
        try:
            pixels = self.reader.read(positions)
        except InputError as error:
            return error
        if self._flip:
            mirror_half(pixels, positions, self._seed)
        return Batch(torch.from_numpy(pixels), positions)


class _Shares(Sampler[Indices]):
    """Each micro-batch of a rank in as many parts as there are workers, which take them in turn.

    They are cut between lanes, so that a lane is one worker's.
    """

    def __init__(
        self, positions: PositionSampler, num_parts: int, batch_size: int, slots_per_lane: int
    ) -> None:
        self._positions = positions
        self._num_parts = num_parts
        self._batch_size = batch_size
        self._slots = slots_per_lane

    def __iter__(self) -> Iterator[Indices]:
        for positions in self._positions:
            first = int(positions[0]) % self._batch_size
            ideal = first + np.arange(1, self._num_parts) * len(positions) / self._num_parts
            cuts = np.rint(ideal / self._slots).astype(np.int64) * self._slots - first
            yield from np.split(positions, np.clip(cuts, 0, len(positions)))

    def __len__(self) -> int:
        return NUM_BATCHES


class StreamLost(StreamError, SharedError):
    """A rank cannot read on, and all of them have stopped before the same step."""


# a step's images, each micro-batch in parts; or why there are none
_Arrived = list[list[Batch]] | Exception


class StreamLoader(DataLoader[Batch]):
    """Endless batches of one rank.

    DataLoader gives whole batches to its workers in turn, so that each would read all lanes of the
    rank. Here each makes a part of every batch, from lanes of its own; the parts are joined.

    Where a stream cannot be read on, all ranks stop before the same step: only then can what was
    trained be saved. Thus each has all of a step's images before it gives the first of them.

    Args:
        dataset: The stream's images.
        positions: The rank's.
        batch_size: Images per step over all ranks.
        accumulate: Micro-batches in a step.
        num_workers: Processes; 0 reads in this one.
        pin_memory: Whether the images go to a GPU.
    """

    def __init__(
        self,
        dataset: StreamBatches,
        positions: PositionSampler,
        batch_size: int,
        accumulate: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._num_parts = max(1, num_workers)
        self._accumulate = accumulate
        self._pin = pin_memory
        self._arrived: SimpleQueue[_Arrived] = SimpleQueue()
        # on the host, so that nobody waits for a device
        self._ranks: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._ranks = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        shares = _Shares(positions, self._num_parts, batch_size, dataset.order.slots_per_lane)
        super().__init__(
            dataset,
            batch_sampler=shares,  # type: ignore[arg-type]  # annotated for lists of indices only
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=_NUM_AHEAD if num_workers else None,
        )

    def __iter__(self) -> Any:
        """Yield batches.

        Raises:
            StreamLost: The stream cannot be read on, by this rank or another; or see `end_wait`.
        """
        parts = super().__iter__()
        asked: SimpleQueue[bool] = SimpleQueue()
        self._arrived = SimpleQueue()
        Thread(target=self._fetch, args=(parts, asked, self._arrived), daemon=True).start()
        try:
            while True:
                asked.put(True)
                arrived = self._arrived.get()
                if isinstance(arrived, Exception) and not isinstance(arrived, StreamError):
                    raise arrived
                failure = str(arrived) if isinstance(arrived, StreamError) else ""
                if failure := self._first_of_all_ranks(failure):
                    raise StreamLost(failure)
                assert isinstance(arrived, list)
                yield from map(self._join, arrived)
        finally:
            asked.put(False)

    def end_wait(self) -> None:
        """Wait for images no more, which may take minutes: for the handler of a signal.

        Where none are waited for, the next wait ends at once: until the step is over in which the
        ranks would agree to stop, a server may have begun to hang.
        """
        self._arrived.put(StreamError("a signal ended the wait for images of the stream"))

    def _fetch(
        self,
        parts: Iterator[Batch | InputError],
        asked: SimpleQueue[bool],
        arrived: SimpleQueue[_Arrived],
    ) -> None:
        """Hand over a step's images each time they are asked for: what a thread of its own does.

        A signal thus ends a wait for a queue, which is made for that. Raised where it finds the
        main thread, an exception may come amid a handshake with a worker, which complains.
        """
        while asked.get():
            try:
                arrived.put([self._take(parts) for _ in range(self._accumulate)])
            except Exception as error:
                arrived.put(error)

    def _take(self, parts: Iterator[Batch | InputError]) -> list[Batch]:
        """Take a batch's parts from the workers; raise what one of them could not help."""
        taken = []
        for part in islice(parts, self._num_parts):
            if isinstance(part, InputError):
                raise part
            taken.append(part)
        return taken

    def _join(self, parts: list[Batch]) -> Batch:
        """Make a batch of its parts: in the main thread, whose GPU the pinned memory is for."""
        if len(parts) == 1 and not self._pin:
            return parts[0]  # no copy
        images = torch.cat([part.images for part in parts])
        positions = np.concatenate([part.positions for part in parts])
        return Batch(images.pin_memory() if self._pin else images, positions)

    def _first_of_all_ranks(self, failure: str) -> str:
        """Give the message of the first rank that has one, else ""; all ranks must call."""
        if self._ranks is None:
            return failure
        any_failed = torch.tensor(bool(failure), dtype=torch.int32)
        dist.all_reduce(any_failed, dist.ReduceOp.MAX, group=self._ranks)
        if not any_failed:
            return ""
        failures = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure, group=self._ranks)
        return next(message for message in failures if message)


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: a data set hands out whole parts."""
    return batch
