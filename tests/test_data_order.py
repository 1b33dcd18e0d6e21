"""Invariant 1: which image is at which step depends on nothing but the seed and the step."""

import itertools

import numpy as np
import pytest

from ddpm_lightning.data.order import (
    GlobalOrder,
    PositionSampler,
    check_batch_size,
    micro_batch,
    permutation,
    validation_batches,
)
from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import Stream


def test_each_epoch_shows_every_image_once_across_borders() -> None:
    order = GlobalOrder(10, seed=3)
    batches = [order.indices(np.arange(start, start + 4)) for start in range(0, 60, 4)]
    epochs = np.concatenate(batches).reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    positions = np.array([71, 3, 25, 3, 0, 19])
    order = GlobalOrder(10, seed=3)
    before = order.indices(positions)
    for epoch in (9, 0, 4):
        order.indices(np.arange(epoch * 10, epoch * 10 + 15))
    np.testing.assert_array_equal(order.indices(positions), before)
    one_by_one = [order.indices(positions[n : n + 1])[0] for n in range(6)]
    np.testing.assert_array_equal(before, one_by_one)
    assert before.dtype == np.int64


def test_order_is_pinned() -> None:
    # Another NumPy that shuffles otherwise would silently change every resumed run.
    assert GlobalOrder(10, seed=0).indices(np.arange(20)).tolist() == PINNED


PINNED = [4, 5, 7, 3, 8, 9, 0, 1, 6, 2, 7, 4, 9, 3, 2, 6, 0, 1, 8, 5]


def test_seeds_and_streams_give_other_orders() -> None:
    shuffles = [
        permutation(50, seed, stream, index).tolist()
        for seed, stream, index in itertools.product((0, 1), (Stream.ORDER, Stream.SPLIT), (0, 1))
    ]
    assert len({tuple(shuffle) for shuffle in shuffles}) == 8


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_micro_batches_cut_the_batch_in_order(world_size: int, accumulate: int) -> None:
    for step in (0, 1, 7):
        parts = [
            micro_batch(step * accumulate + number, 16, world_size, accumulate, rank)
            for rank in range(world_size)
            for number in range(accumulate)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(step * 16, step * 16 + 16))
        assert {len(part) for part in parts} == {16 // (world_size * accumulate)}


@pytest.mark.parametrize(("batch_size", "nearest"), [(30, "28 and 32"), (3, "4"), (5, "4 and 8")])
def test_uneven_batch_is_refused(batch_size: int, nearest: str) -> None:
    check_batch_size(32, 2, 2)
    message = f"--data.batch_size {batch_size} does not divide by 2 ranks x 2 .*: {nearest} "
    with pytest.raises(InputError, match=message):
        check_batch_size(batch_size, 2, 2)
    with pytest.raises(InputError, match=message):
        PositionSampler(batch_size, 2, 2, 0, lambda: 0)


def test_sampler_from_a_later_step_gives_the_tail() -> None:
    whole = list(itertools.islice(PositionSampler(8, 2, 2, 1, lambda: 0), 20))
    tail = list(itertools.islice(PositionSampler(8, 2, 2, 1, lambda: 4), 12))
    np.testing.assert_array_equal(tail, whole[8:])
    assert whole[0].tolist() == [4, 5]
    assert whole[1].tolist() == [6, 7]
    assert whole[2].tolist() == [12, 13]


def test_sampler_goes_on_when_iterated_again() -> None:
    step = 0
    sampler = PositionSampler(8, 1, 1, 0, lambda: step)
    assert next(iter(sampler))[0] == 0
    step = 5
    assert next(iter(sampler))[0] == 40
    assert len(sampler) > 10**9


@pytest.mark.parametrize("num_images", [1, 7, 8, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shows_every_image_to_one_rank(num_images: int, world_size: int) -> None:
    ranks = [validation_batches(num_images, 4, world_size, rank) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_images))
    whole = validation_batches(num_images, 4, 1, 0)
    assert sorted(batch.tolist() for batch in batches if len(batch)) == [b.tolist() for b in whole]
    assert len(set(map(len, ranks))) == 1  # else a rank waits for what others do not do
