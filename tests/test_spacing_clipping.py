"""Which timesteps a sampler visits, and how it clips."""

from typing import get_args

import pytest
import torch

from ddpm_lightning.diffusion.clipping import Clip, clip_x_0
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.schedules import Schedule, make_betas
from ddpm_lightning.diffusion.timesteps import (
    BY_LOG_SNR,
    SPACINGS,
    check_spacing,
    space_by_log_snr,
    space_timesteps,
)
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import make_sampler
from tests.conftest import Golden


@pytest.mark.parametrize(
    ("key", "spacing"), [("250", "even"), ("ddim50", "ddim50"), ("10,15,20", "10,15,20")]
)
def test_spacing_is_the_reference(golden: Golden, key: str, spacing: str) -> None:
    timesteps = golden[f"respace/{key}/timesteps"].long()
    assert torch.equal(space_timesteps(1000, len(timesteps), spacing), timesteps)
    assert check_spacing(spacing) in (None, len(timesteps))


def test_ties_round_as_in_the_reference() -> None:
    """Strides are added up from 0: at (1000, 35) a product, or another order, gives 500."""
    assert space_timesteps(1000, 35)[17] == 499
    assert space_timesteps(1000, 91)[5] == 56


@pytest.mark.parametrize(
    ("spacing", "num_steps", "expected"),
    [
        ("leading", 4, [0, 5, 10, 15]),
        ("leading", 3, [0, 6, 12]),
        ("trailing", 4, [4, 9, 14, 19]),
        ("trailing", 3, [6, 12, 19]),
        ("trailing", 1, [19]),
        ("leading", 1, [0]),
        ("ddim7", 7, [0, 3, 6, 9, 12, 15, 18]),
        ("ddim20", 20, list(range(20))),
        ("2,3", 5, [0, 9, 10, 14, 19]),
        ("1,1,2", 4, [0, 7, 14, 19]),
    ],
)
def test_spacings_by_hand(spacing: str, num_steps: int, expected: list[int]) -> None:
    assert space_timesteps(20, num_steps, spacing).tolist() == expected


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_give_as_many_as_asked(spacing: str) -> None:
    process = Process(make_betas("cosine", 50))
    for num_steps in range(1, 51):
        sampler = make_sampler("ddim", num_steps, spacing=spacing)
        timesteps = sampler.respace(process).timesteps
        assert len(timesteps) == num_steps
        assert (timesteps.diff() > 0).all()
        assert 0 <= timesteps[0] <= timesteps[-1] < 50
    assert torch.equal(timesteps, torch.arange(50))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_log_snr_falls_evenly_to_the_last_step_but_one(schedule: Schedule) -> None:
    """From where `trailing` ends to the least that counts, or to the schedule's own end."""
    process = Process(make_betas(schedule, 1000))
    alphas_cumprod = process.alphas_cumprod
    log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
    timesteps = space_by_log_snr(alphas_cumprod, 10)
    assert timesteps[[0, -1]].tolist() == [99, 999]
    least = max(-8.0, float(log_snr[-1]))
    stride = (log_snr[99] - least) / 9
    nearest = log_snr[99] - stride * torch.arange(9)
    steps = log_snr[:-1] - log_snr[1:]  # as near as the schedule lets it be
    assert ((log_snr[timesteps[:-1]] - nearest).abs() <= steps[timesteps[:-1]]).all()
    with pytest.raises(InputError, match=r"num_steps must lie in 1\.\.1000, got 1001"):
        make_sampler("dpmpp_2m", 1001, spacing=BY_LOG_SNR).respace(process)


@pytest.mark.filterwarnings("error")
def test_log_snr_where_nothing_of_x_0_is_left() -> None:
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    assert space_by_log_snr(alphas_cumprod, 1).tolist() == [3]
    assert space_by_log_snr(alphas_cumprod, 2).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("spacing", "num_steps", "told"),
    [
        ("linspace", 5, "spacing linspace: none of even, leading, trailing, log_snr, ddimN"),
        ("ddim300", 300, "no whole stride visits 300 of 1000 timesteps; the nearest is ddim334"),
        ("ddim1", 1, "no whole stride visits 1 of 1000 timesteps; the nearest is ddim2"),
        ("ddim50", 40, "num_steps 40: the spacing ddim50 has 50 steps"),
        ("10,15", 20, "num_steps 20: the spacing 10,15 has 25 steps"),
        ("334,400,1", 735, "section 2 has only 333 of the 1000 timesteps"),
        ("250", 250, "spacing 250: a number alone is num_steps"),
        ("", 5, "spacing : none of even"),
        ("trailing", 0, r"num_steps must lie in 1\.\.1000, got 0"),
        ("600,600", 1200, r"num_steps must lie in 1\.\.1000, got 1200"),
    ],
)
def test_impossible_spacings_are_refused(spacing: str, num_steps: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        space_timesteps(1000, num_steps, spacing)


# --- clipping ----------------------------------------------------------------------------------


def test_static_clipping_clamps(golden: Golden) -> None:
    x = 3 * golden["noise"]
    assert torch.equal(clip_x_0(x, "static"), x.clamp(-1, 1))
    assert torch.equal(clip_x_0(x, "none"), x)


def test_dynamic_clipping_scales_each_image_by_its_own_quantile(golden: Golden) -> None:
    x = golden["noise"] * torch.tensor([0.1, 1.0, 3.0]).reshape(-1, 1, 1, 1)
    clipped = clip_x_0(x, "dynamic")
    assert torch.equal(clipped[0], x[0])  # within the range already
    for image, found in zip(x[1:], clipped[1:], strict=True):
        limit = float(image.abs().flatten().quantile(0.995))
        assert limit > 1
        torch.testing.assert_close(found, image.clamp(-limit, limit) / limit, rtol=1e-12, atol=0)
        assert torch.equal(clip_x_0(image[None], "dynamic")[0], found)  # others do not matter
    assert clip_x_0(x.float(), "dynamic").dtype == torch.float32
    assert clip_x_0(x[:0], "dynamic").shape == (0, 3, 4, 4)
    assert clip_x_0(torch.full((1, 1, 1, 1), 5.0), "dynamic") == 1


@pytest.mark.parametrize("clip", get_args(Clip))
def test_the_reverse_mean_is_that_of_the_clipped_x_0(golden: Golden, clip: Clip) -> None:
    p = Process(make_betas("linear", 1000))
    x_t, t = 3 * golden["linear/x_t"], golden["t"]
    output = golden.net(x_t, t)
    reverse = p.p_mean_variance(output, x_t, t, clip)
    pred_x_0 = clip_x_0(p.pred_x_0(output, x_t, t), clip)
    assert torch.equal(reverse.pred_x_0, pred_x_0)
    assert torch.equal(reverse.mean, p.posterior(pred_x_0, x_t, t).mean)


def test_unknown_clipping_is_refused() -> None:
    with pytest.raises(ValueError, match="static, dynamic or none, got True"):
        clip_x_0(torch.zeros(1, 1, 1, 1), True)  # type: ignore[arg-type]
