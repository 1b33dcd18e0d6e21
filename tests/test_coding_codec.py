"""The codec: what goes in comes out, at about the theoretical rate, and any beginning will do."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from ddpm_lightning.coding import bitstream, codec
from ddpm_lightning.coding.bitstream import NUM_HEADER_BYTES
from ddpm_lightning.coding.codec import decode, encode, space_by_noise
from ddpm_lightning.diffusion.process import LEARNED_VARIANCES, Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import make_betas
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_float
from ddpm_lightning.networks import UNet
from tests.test_coding_bitstream import header
from tests.training import redraw, tiny_module

Net = Callable[[Tensor, Tensor], Tensor]

SHAPE = (1, 8, 8)


def picture(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """A smooth picture with some noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    rows = torch.linspace(-60, 60, shape[-2])[:, None]
    return (128 + rows + 10 * noise).clamp(0, 255).to(torch.uint8)


def respaced(num_steps: int = 8, variance: Variance = "fixed_small") -> Process:
    process = Process(make_betas("cosine", 1000), variance)
    return process.respace(space_by_noise(process, num_steps))


def knowing(process: Process, pred_x_0: Tensor) -> Net:
    """A network that predicts one x_0 always, whatever x_t is."""
    alphas_cumprod = dict(
        zip(process.timesteps.tolist(), process.alphas_cumprod.tolist(), strict=True)
    )

    def net(x_t: Tensor, t: Tensor) -> Tensor:
        a = alphas_cumprod[int(t)]
        noise: Tensor = (x_t - a**0.5 * pred_x_0) / (1 - a) ** 0.5
        return noise

    return net


def nearly(process: Process, image: Tensor, error: float = 0.05) -> Net:
    """A network that knows the picture but for an error, the same everywhere."""
    return knowing(process, to_float(image[None], torch.float64) * (1 - error))


# --- timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 20, 1000])
def test_timesteps_rise_to_the_last(
    schedule: Literal["cosine", "linear"], num_timesteps: int
) -> None:
    process = Process(make_betas(schedule, num_timesteps))
    for num_steps in {1, 2, 7, num_timesteps - 1, num_timesteps}:
        if 1 <= num_steps <= num_timesteps:
            timesteps = space_by_noise(process, num_steps)
            assert len(timesteps) == num_steps
            assert (timesteps.diff() > 0).all()
            assert int(timesteps[0]) >= 0
            assert int(timesteps[-1]) == num_timesteps - 1
    for num_steps in (0, num_timesteps + 1):
        with pytest.raises(InputError, match=f"num_steps must lie in 1..{num_timesteps}"):
            space_by_noise(process, num_steps)


def test_timesteps_are_even_in_log_snr() -> None:
    process = Process(make_betas("cosine", 1000))
    timesteps = space_by_noise(process, 20)
    ratio = process.alphas_cumprod / (1 - process.alphas_cumprod)
    log_snr = ratio.log()[timesteps]
    assert float(log_snr[0]) == pytest.approx(5, abs=0.1)
    assert float(log_snr[-2]) == pytest.approx(-5 + 10 / 19, abs=0.1)
    np.testing.assert_allclose(log_snr[:-1].diff().numpy(), -10 / 19, atol=0.05)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        picture((3, 4, 6)),
        torch.zeros(1, 5, 5, dtype=torch.uint8),
        torch.full((1, 2, 2), 255, dtype=torch.uint8),
    ],
    ids=["smooth", "colour", "black", "white"],
)
def test_a_whole_stream_is_lossless(image: Tensor) -> None:
    process = respaced(3)
    for prediction in (image, picture(tuple(image.shape), seed=7)):  # a good and a bad model
        net = nearly(process, prediction)
        data, history = encode(net, process, image, seed=3)
        decoded = decode(net, process, data, 3, tuple(image.shape))  # type: ignore[arg-type]
        assert decoded.is_whole
        assert decoded.num_steps == 3
        torch.testing.assert_close(decoded.image, image, rtol=0, atol=0)
        assert history[-1] == (-1, 8 * len(data) / image.numel(), history[-1].theoretical, 0)


def test_all_levels_are_lossless() -> None:
    process, image = respaced(2), torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).flip(1)
    net = nearly(process, image)
    data, _ = encode(net, process, image, 0)
    assert torch.equal(decode(net, process, data, 0, (1, 16, 16)).image, image)


@pytest.mark.parametrize(
    ("prediction", "variance", "is_pure_noise", "num_steps"),
    [
        ("noise", "fixed_small", False, 3),
        ("x_0", "learned", True, 3),
        ("mu", "learned_range", False, 2),
        ("v", "fixed_large", True, 1),
    ],
)
def test_models_of_all_kinds_are_lossless(
    prediction: Prediction, variance: Variance, is_pure_noise: bool, num_steps: int
) -> None:
    """With networks; what tells a learned variance is not looked at."""
    is_learned = variance in LEARNED_VARIANCES
    module = tiny_module(
        redraw(UNet(1, 2 if is_learned else 1, 32, (1,), 1, ())),
        prediction=prediction,
        variance=variance,
        zero_terminal_snr=is_pure_noise,
        loss="hybrid" if is_learned else "simple",
    ).eval()
    image, timesteps = picture((1, 4, 4)), space_by_noise(module.process, num_steps)
    process = module.process.respace(timesteps)
    fixed = Process(module.process.betas, prediction=prediction).respace(timesteps)
    with torch.inference_mode():
        data, _ = encode(module, process, image, 0)
        decoded = decode(lambda x_t, t: module(x_t, t)[:, :1], fixed, data, 0, (1, 4, 4))
    assert decoded.is_whole
    assert torch.equal(decoded.image, image)


def test_every_beginning_decodes_and_longer_ones_to_more() -> None:
    process, image = respaced(), picture()
    net = nearly(process, image, 0.1)
    data, history = encode(net, process, image, 0)
    content = bitstream.pack(header(len(data)), data)
    assert len(history) == process.num_timesteps + 1
    errors, counts = [], []
    for length in range(NUM_HEADER_BYTES, len(content) + 1):  # of the file
        _, part = bitstream.unpack(content[:length], "file")
        cut = len(part)
        assert part == data[:cut]
        decoded = decode(net, process, part, 0, SHAPE)
        assert decoded.image.shape == SHAPE
        assert decoded.image.dtype == torch.uint8
        assert decoded.is_whole == (cut == len(data))
        counts.append(decoded.num_steps)
        errors.append(float((decoded.image.double() - image).square().mean().sqrt()))
        # the table is true: what it says has arrived has, and no more
        for number, step in enumerate(history[:-1], start=1):
            spare = cut - step.rate * image.numel() / 8
            assert decoded.num_steps >= number if spare > 1.2 else True
            assert decoded.num_steps < number if spare < -0.1 else True
        if 0 < decoded.num_steps < process.num_timesteps:
            assert errors[-1] == pytest.approx(history[decoded.num_steps - 1].rmse)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == process.num_timesteps
    assert errors[-1] == 0
    pixels = errors[counts.index(process.num_timesteps) :]  # arrive exact, one after the other
    assert pixels == sorted(pixels, reverse=True)
    assert len(set(pixels)) > 10


def test_a_cut_stream_can_be_finished_by_sampling() -> None:
    process, image = respaced(), picture()
    module = tiny_module(schedule="cosine", num_timesteps=1000).eval()
    with torch.inference_mode():
        data, _ = encode(module, process, image, 0)
        for cut in (0, len(data) // 8):
            predicted = decode(module, process, data[:cut], 0, SHAPE)
            drawn = decode(module, process, data[:cut], 0, SHAPE, finish=True)
            again = decode(module, process, data[:cut], 0, SHAPE, finish=True)
            assert torch.equal(drawn.image, again.image)
            assert not torch.equal(drawn.image, predicted.image)
            assert (drawn.num_steps, drawn.is_whole) == (predicted.num_steps, False)
        whole = decode(module, process, data, 0, SHAPE, finish=True)
    assert whole.is_whole
    assert torch.equal(whole.image, image)


# --- the chain ---------------------------------------------------------------------------------


def test_the_receiver_s_chain_is_that_of_q() -> None:
    """Each x_t follows q given the one before and x_0, as Kolmogorov and Smirnov see it."""
    process, image = respaced(4), picture()
    x_0 = to_float(image[None], torch.float64)
    net = nearly(process, image, 0.3)
    by_q: list[Tensor] = []
    by_p: list[Tensor] = []
    for seed in range(16):
        data, _ = encode(net, process, image, seed)
        chain: list[Tensor] = []

        def watched(x_t: Tensor, t: Tensor, chain: list[Tensor] = chain) -> Tensor:
            chain.append(x_t)
            return net(x_t, t)

        assert decode(watched, process, data, seed, SHAPE).is_whole
        alpha_cumprod = process.alphas_cumprod[-1]
        by_q.append((chain[0] - alpha_cumprod.sqrt() * x_0) / (1 - alpha_cumprod).sqrt())
        for index, (x_t, x_prev) in zip((3, 2, 1), pairwise(chain), strict=True):
            for mean_of, whitened in ((x_0, by_q), (0.7 * x_0, by_p)):
                mean, log_variance = process.posterior(mean_of, x_t, torch.tensor([index]))
                whitened.append((x_prev - mean) / (0.5 * log_variance).exp())
    steps = torch.cat(by_q).reshape(16, 4, -1).transpose(0, 1).flatten(1)
    for values in steps:  # 1,024 of each step
        assert abs(values.mean()) < 4 / 32
        assert abs(values.std() - 1) < 3 / 32
        assert kstest(values.numpy(), "norm").pvalue > 0.01
    # one step tells nothing of the next
    others = steps.corrcoef() - torch.eye(4)
    assert others.abs().max() < 4 / 32
    # which is no feature of the test: p, which the receiver knew, is told from q at the last step
    last = torch.cat(by_p).reshape(16, 3, -1)[:, -1].flatten()
    assert kstest(last.numpy(), "norm").pvalue < 1e-6


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_the_theoretical_rate_is_the_bound(error: float) -> None:
    """Where x_0 is missed by e, the steps' KL add up to e^2 (SNR(0) - SNR(T)) / 2 nats."""
    process, image = respaced(), picture()
    x_0 = to_float(image[None], torch.float64)
    _, history = encode(nearly(process, image, error), process, image, 0)
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    last = float(process.alphas_cumprod[-1])
    prior = 0.5 * (last * x_0.square() - last - math.log1p(-last)).mean() / math.log(2)
    for step, ratio in zip(history, snr.flip(0).tolist(), strict=False):
        rate = 0.5 * (error * x_0).square().mean() * (ratio - float(snr[-1])) / math.log(2)
        assert step.theoretical == pytest.approx(float(prior + rate), rel=1e-9, abs=1e-9)
        assert step.rmse == pytest.approx(
            error * float(x_0.square().mean().sqrt()) * 127.5, abs=0.3
        )


def test_the_measured_rate_is_near_the_theoretical() -> None:
    """Of 256 pixels: at most twice it before the pixels, whose own coding is near it."""
    process, image = respaced(), picture((1, 16, 16))
    _, history = encode(nearly(process, image, 0.25), process, image, 0)
    last, whole = history[-2:]
    assert last.theoretical > 0.3
    assert 1 < last.rate / last.theoretical < 2
    pixels, in_theory = whole.rate - last.rate, whole.theoretical - last.theoretical
    assert in_theory > 1
    assert in_theory < pixels < in_theory + 16 / 256  # the width's four bits, and the last byte


def test_pixels_have_the_paper_s_probabilities() -> None:
    mean = torch.tensor([[[[-1.0, 0.1, 1.3]]]], dtype=torch.float64)
    probabilities = codec._pixel_probabilities(codec._Gaussian(mean, 0.02), width=2.0)
    assert probabilities.shape == (3, 256)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    half = 1 / 255
    assert probabilities[0, 0] == pytest.approx(norm.cdf(half / 0.04))  # from -infinity on
    error = 140 / 127.5 - 1 - 0.1
    inner = norm.cdf((error + half) / 0.04) - norm.cdf((error - half) / 0.04)
    assert probabilities[1, 140] == pytest.approx(inner)
    assert probabilities[2, 255] == pytest.approx(1)


def test_the_stream_depends_on_picture_and_seed_alone() -> None:
    """Nor on the variance that the model samples with, which the codec does not use."""
    image = picture()
    small, large = respaced(4), respaced(4, "fixed_large")
    state = torch.get_rng_state()
    data, history = encode(nearly(small, image), small, image, 5)
    torch.rand(3)
    np.random.default_rng().random()
    assert encode(nearly(large, image), large, image, 5) == (data, history)
    assert encode(nearly(small, image), small, image, 6)[0] != data
    torch.set_rng_state(state)


def test_random_state_is_left_alone() -> None:
    process, image = respaced(2), picture()
    state = torch.get_rng_state()
    data, _ = encode(nearly(process, image), process, image, 0)
    decode(nearly(process, image), process, data, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_diverged_are_refused() -> None:
    process = respaced(2)
    with pytest.raises(InputError, match="a prediction is not finite"):
        encode(lambda x_t, t: x_t * math.nan, process, picture(), 0)
