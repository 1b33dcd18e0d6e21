"""Bytes, blocks and samples: what is read is what was written, and samples are those of q."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest

from ddpm_lightning.coding.blocks import BlockReader, BlockWriter
from ddpm_lightning.coding.channel import (
    BLOCK_BITS,
    MAX_EXPONENT,
    Target,
    candidate,
    choose,
    count_candidates,
    mix,
    unmix,
)
from ddpm_lightning.coding.entropy import SymbolReader, Symbols, SymbolWriter

Sent = list[tuple[Symbols, Symbols | NDArray[np.float64]]]


def random_symbols(rng: np.random.Generator) -> tuple[SymbolWriter, Sent]:
    """A stream of both kinds of symbols, from almost certain ones to many that are alike."""
    writer, sent = SymbolWriter(), []
    for _ in range(rng.integers(0, 8)):
        count = int(rng.integers(1, 8))
        given: Symbols | NDArray[np.float64]
        if rng.random() < 0.5:
            given = rng.dirichlet(np.full(rng.integers(2, 257), rng.choice([0.01, 1])), count)
            symbols = np.array([rng.choice(len(p), p=p) for p in given], dtype=np.int32)
            writer.put(symbols, given)
        else:
            given = rng.integers(2, 2**MAX_EXPONENT, count).astype(np.int32)
            symbols = rng.integers(0, given).astype(np.int32)
            writer.put_uniform(symbols, given)
        sent.append((symbols, given))
    return writer, sent


def test_every_beginning_of_a_stream_gives_the_first_symbols() -> None:
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(40):
        writer, sent = random_symbols(rng)
        data = writer.to_bytes()
        lengths.append(8 * len(data) - writer.num_bits)
        known = 0
        for cut in range(len(data) + 1):
            reader, count = SymbolReader(data[:cut]), 0
            for symbols, given in sent:
                taken = reader.take(given)
                np.testing.assert_array_equal(taken, symbols[: len(taken)])
                count += len(taken)
            assert count >= known
            known = count
        assert known == sum(len(symbols) for symbols, _ in sent)
    # the last byte is not full, and the coder's weights are rounded
    assert 0 < max(lengths) < 10
    assert min(lengths) > -1


def test_a_stream_of_other_symbols_is_read_without_a_crash() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        given = rng.dirichlet(np.full(5, 0.3), 40)
        taken = SymbolReader(rng.bytes(12)).take(given)
        assert len(taken) <= 40
        assert set(taken.tolist()) <= set(range(5))


def test_mixing_is_orthonormal_and_spreads() -> None:
    for dim in (1, 2, 63, 64, 784):
        x = np.random.default_rng(dim).normal(size=dim)
        np.testing.assert_allclose(unmix(mix(x, 5), 5), x, atol=1e-12)
        assert np.linalg.norm(mix(x, 5)) == pytest.approx(np.linalg.norm(x), rel=1e-12)
    single = np.zeros(64)
    single[3] = 1
    # (1 + sin) / 64, in whole cycles
    assert np.split(mix(single, 5) ** 2, 2)[0].sum() == pytest.approx(0.5, abs=1e-12)
    assert not np.array_equal(mix(np.ones(64), 5), mix(np.ones(64), 6))


def test_bits_are_the_kl() -> None:
    shift = np.array([0.3, -1.2])
    for scale in (1.0, 0.4):
        # KL of two Gaussians in one dimension each, in nats, summed
        nats = sum(-math.log(scale) + (scale**2 + m**2) / 2 - 0.5 for m in shift)
        assert Target(shift, scale).bits() == pytest.approx(nats / math.log(2), rel=1e-12)


@pytest.mark.parametrize(("bits", "scale", "dim"), [(1.0, 1.0, 1), (3.0, 1.0, 4), (2.0, 0.6, 2)])
def test_samples_are_those_of_q(bits: float, scale: float, dim: int) -> None:
    """Kolmogorov and Smirnov do not tell 1,000 of them from q, along the shift and across."""
    spread = Target(np.zeros(dim), scale).bits()
    length = math.sqrt(2 * (bits - spread) * math.log(2))
    direction = np.random.default_rng(dim).normal(size=dim)
    direction /= np.linalg.norm(direction)
    target = Target(length * direction, scale)
    assert target.bits() == pytest.approx(bits)

    keys = range(1000)
    samples = np.stack([candidate(choose(target, key), dim, key) for key in keys])
    whitened = (samples - target.shift) / scale
    assert kstest(whitened @ direction, "norm").pvalue > 0.01
    across = np.linalg.svd(direction[None])[2][-1] if dim > 1 else direction
    assert kstest(whitened @ across, "norm").pvalue > 0.01
    # which is no feature of the test: samples of p are told at once
    assert kstest((samples - whitened) @ direction / length, "norm").pvalue < 1e-6


def test_samples_of_a_full_block_lack_the_far_tail_alone() -> None:
    """With 2^18 candidates a block of 8 bits is within 0.15 deviations of q, in mean and width."""
    assert count_candidates(BLOCK_BITS) == 2**MAX_EXPONENT
    shift = np.array([math.sqrt(2 * BLOCK_BITS * math.log(2))])
    keys = range(80)
    indices = [choose(Target(shift, 1.0), key) for key in keys]
    errors = np.array([candidate(i, 1, key)[0] for i, key in zip(indices, keys, strict=True)])
    errors -= shift[0]
    # three standard errors beyond that tolerance
    assert abs(errors.mean()) < 0.15 + 3 / math.sqrt(80)
    assert abs(errors.std() - 1) < 0.15 + 3 / math.sqrt(160)
    assert errors.max() < 3


def test_a_number_is_small_where_q_is_near_p() -> None:
    near = [choose(Target(np.full(3, 0.1), 1.0), key) for key in range(100)]
    far = [choose(Target(np.full(3, 1.2), 1.0), key) for key in range(100)]
    assert np.log2(np.add(near, 1)).mean() < 1
    assert 2 < np.log2(np.add(far, 1)).mean() < 5  # 3.1 bits


def test_the_receiver_has_the_samples_of_the_sender() -> None:
    """Pictures of 48 dimensions and from 0 to 40 bits, each q being met, for what it costs."""
    rng = np.random.default_rng(0)
    bits = [0.0, 0.3, 1.0, 2.0, 20.0, 40.0]
    errors, costs = [], []
    for key in range(12):
        writer = SymbolWriter()
        sender = BlockWriter(writer, key)
        sent, ends = [], []
        for each in bits:
            shift = rng.normal(size=48)
            shift *= math.sqrt(2 * each * math.log(2)) / np.linalg.norm(shift)
            sent.append(sender.send(Target(shift, 1.0)))
            errors.append(sent[-1] - shift)
            ends.append(writer.num_bits)
        costs.append(np.diff(ends, prepend=0))
        data = writer.to_bytes()
        receiver = BlockReader(SymbolReader(data), key)
        for sample in sent:
            np.testing.assert_array_equal(receiver.receive(48), sample)

        cut = BlockReader(SymbolReader(data[: len(data) // 2]), key)
        received = [cut.receive(48) for _ in bits]
        known = sum(sample is not None for sample in received)
        assert 0 < known < len(bits)
        assert all(sample is None for sample in received[known:])
        imagined = cut.imagine(48)
        assert np.isfinite(imagined).all()
        assert not any(np.array_equal(imagined, sample) for sample in sent)
    assert kstest(np.concatenate(errors), "norm").pvalue > 0.01
    mean = np.mean(costs, axis=0)
    # KL, and some four bits for each block of up to 8, and the levels
    for each, cost in zip(bits, mean, strict=True):
        assert each < cost < 2 * each + 8, (each, cost)


def test_unequal_variances_are_sent_too() -> None:
    """As x_T is under a schedule that does not end in noise: 48 dimensions, 3 blocks or more."""
    target = Target(np.full(48, 0.5), 0.6)
    assert target.bits() > 2 * BLOCK_BITS
    samples = [BlockWriter(SymbolWriter(), key).send(target) for key in range(8)]
    assert kstest((np.concatenate(samples) - 0.5) / 0.6, "norm").pvalue > 0.01
