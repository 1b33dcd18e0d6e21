"""Blocks, lanes and windows: the order of a stream, without any file."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_lightning.data.order import Indices, micro_batch
from ddpm_lightning.data.stream_order import StreamOrder, Window, choose_lanes

# sizes of the blocks, B, lanes, blocks in a window
LAYOUTS = [
    ([5] * 20, 10, 5, 2),
    ([1, 9, 2, 8, 3, 7, 30], 12, 4, 2),  # blocks much larger than a lane's share
    ([1] * 50, 7, 7, 3),  # a block per image
    ([40], 8, 4, 1),  # fewer blocks than lanes
    ([13, 11], 24, 1, 5),  # one lane, a batch as large as the epoch
    ([3, 4, 5] * 30, 64, 64, 4),
]


def images(order: StreamOrder, positions: Indices) -> list[int]:
    """The images at positions, window by window as a reader finds them."""
    found: list[int] = []
    for run in order.runs(positions):
        rows = [
            1000 * part.block + row
            for part in order.parts(run.window)
            for row in range(part.start, part.stop)
        ]
        assert len(rows) == run.window.stop - run.window.start
        found += [rows[pick] for pick in order.shuffle(run.window)[run.offsets]]
    return found


@pytest.mark.parametrize(("sizes", "batch_size", "lanes", "blocks"), LAYOUTS)
def test_every_epoch_has_every_image_once(
    sizes: list[int], batch_size: int, lanes: int, blocks: int
) -> None:
    order = StreamOrder(sizes, batch_size, lanes, blocks, seed=3)
    all_images = [1000 * block + row for block, size in enumerate(sizes) for row in range(size)]
    epochs = [
        images(order, np.arange(epoch * sum(sizes), (epoch + 1) * sum(sizes)))
        for epoch in (0, 1, 2, 1000)
    ]
    for shown in epochs:
        assert sorted(shown) == all_images
    told = order.indices(np.arange(sum(sizes)))
    assert [all_images[index] for index in told.tolist()] == epochs[0]
    assert len({tuple(shown) for shown in epochs}) == 4
    assert (
        images(StreamOrder(sizes, batch_size, lanes, blocks, seed=4), np.arange(40))
        != (epochs[0] + epochs[1] + epochs[2])[:40]
    )


@pytest.mark.parametrize(("sizes", "batch_size", "lanes", "blocks"), LAYOUTS)
def test_an_image_depends_on_its_position_alone(
    sizes: list[int], batch_size: int, lanes: int, blocks: int
) -> None:
    whole = images(
        StreamOrder(sizes, batch_size, lanes, blocks, 0), np.arange(5 * batch_size + sum(sizes))
    )
    positions = np.random.default_rng(0).integers(0, len(whole), 30)
    order = StreamOrder(sizes, batch_size, lanes, blocks, 0)
    assert images(order, positions) == [whole[position] for position in positions]
    assert order.runs(np.arange(0)) == []


@pytest.mark.parametrize(("sizes", "batch_size", "lanes", "blocks"), LAYOUTS)
def test_lanes_go_from_window_to_window(
    sizes: list[int], batch_size: int, lanes: int, blocks: int
) -> None:
    order = StreamOrder(sizes, batch_size, lanes, blocks, 0)
    shown: dict[int, list[tuple[Window, int]]] = {lane: [] for lane in range(lanes)}
    for step in range(3 * sum(sizes) // batch_size):
        for run in order.runs(np.arange(step * batch_size, (step + 1) * batch_size)):
            shown[run.window.lane] += [(run.window, offset) for offset in run.offsets.tolist()]
    for places in shown.values():
        for (window, offset), place in pairwise(places):
            at_end = offset == window.stop - window.start - 1
            assert place == ((order.following(window), 0) if at_end else (window, offset + 1))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    slots=st.integers(1, 6),
    lanes=st.integers(1, 16),
    blocks=st.integers(1, 8),
    num_ranks=st.integers(1, 8),
    epoch=st.integers(0, 5),
)
def test_ranks_share_an_epoch_out_whatever_the_layout(
    sizes: list[int], slots: int, lanes: int, blocks: int, num_ranks: int, epoch: int
) -> None:
    batch_size = slots * lanes * num_ranks
    order = StreamOrder(sizes, batch_size, lanes, blocks, seed=0)
    begin, end = epoch * order.num_images, (epoch + 1) * order.num_images
    shown: list[int] = []
    for step in range(begin // batch_size, -(-end // batch_size)):
        for rank in range(num_ranks):
            positions = micro_batch(step, batch_size, num_ranks, 1, rank)
            shown += images(order, positions[(positions >= begin) & (positions < end)])
    all_images = [1000 * block + row for block, size in enumerate(sizes) for row in range(size)]
    assert sorted(shown) == all_images


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_rank_has_lanes_of_its_own(num_ranks: int, accumulate: int) -> None:
    order = StreamOrder([7] * 200, batch_size=32, num_lanes=16, window_blocks=2, seed=0)
    lanes = [
        {
            run.window.lane
            for index in range(10 * accumulate)
            for run in order.runs(micro_batch(index, 32, num_ranks, accumulate, rank))
        }
        for rank in range(num_ranks)
    ]
    assert sorted(lane for of_rank in lanes for lane in of_rank) == list(range(16))


def test_what_is_read_twice_is_less_than_a_fifth() -> None:
    """Of blocks that can only be read whole, over an epoch."""
    for num_blocks in (60, 200, 600):
        lanes, blocks = choose_lanes(128, num_blocks, 2**20, 20)
        order = StreamOrder([20] * num_blocks, 128, lanes, blocks, 0)
        for num_ranks in (1, 2, 4):
            if lanes % num_ranks:
                continue
            for rank in range(num_ranks):
                steps = range(order.num_images // 128)
                windows = {
                    run.window
                    for step in steps
                    for run in order.runs(micro_batch(step, 128, num_ranks, 1, rank))
                }
                read = 20 * sum(len(order.parts(window)) for window in windows)
                assert read <= 1.2 * order.num_images / num_ranks, (num_blocks, num_ranks)


@pytest.mark.parametrize(
    ("batch_size", "num_blocks", "block_bytes", "block_images", "expected"),
    [
        (128, 10_000, 2**20, 100, (64, 2)),
        (128, 10_000, 100, 1, (64, 2)),
        (100, 10_000, 2**20, 100, (50, 2)),
        (67, 10_000, 2**20, 100, (1, 128)),
        (128, 100, 2**20, 100, (8, 16)),
        (128, 3, 2**20, 100, (1, 128)),
        (128, 200, 3 * 2**20, 1000, (16, 2)),  # many images in a block
        (128, 10_000, 3 * 2**20, 10**6, (64, 1)),
        (128, 10_000, 10 * 2**20, 100, (16, 1)),  # large ones
        (4, 10_000, 2**20, 100, (4, 32)),
        (128, 10_000, 2**30, 100, (1, 1)),
    ],
)
def test_lanes_and_windows(
    batch_size: int,
    num_blocks: int,
    block_bytes: float,
    block_images: float,
    expected: tuple[int, int],
) -> None:
    assert choose_lanes(batch_size, num_blocks, block_bytes, block_images) == expected
