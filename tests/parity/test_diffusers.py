"""Ours against diffusers': the same network and the same chain."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from torch import Tensor, nn

from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import Schedule, make_betas, rescale_to_zero_snr
from ddpm_lightning.networks.unet import Attention, Block, Downsample, UNet, Upsample
from ddpm_lightning.samplers import DDIMSampler, DDPMSampler
from tests.conftest import Golden
from tests.parity.networks import diffusers_unet
from tests.test_unet import CIFAR10, PIXELS_256


def copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weight and bias; a 1x1 convolution's weight is a linear layer's with two more axes."""
    for name, parameter in target.named_parameters():
        parameter.data.copy_(source.get_parameter(name).data.reshape(parameter.shape))


def copy_block(ours: Block, resnet: Any, attention: Any) -> None:
    res = ours.res
    for source, name in [
        (res.norm_1, "norm1"),
        (res.conv_1, "conv1"),
        (res.embed, "time_emb_proj"),
        (res.norm_2, "norm2"),
        (res.conv_2, "conv2"),
    ]:
        copy(source, getattr(resnet, name))
    if not isinstance(res.shortcut, nn.Identity):
        copy(res.shortcut, resnet.conv_shortcut)
    if ours.attention is not None:
        assert attention is not None
        copy_attention(ours.attention, attention)


def copy_attention(ours: Attention, theirs: Any) -> None:
    copy(ours.norm, theirs.group_norm)
    copy(ours.proj, theirs.to_out[0])
    assert ours.qkv.bias is not None
    weights, biases = ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3)
    for weight, bias, layer in zip(
        weights, biases, (theirs.to_q, theirs.to_k, theirs.to_v), strict=True
    ):
        layer.weight.data.copy_(weight.flatten(1))
        layer.bias.data.copy_(bias)


def blocks_of(stages: Any, resample: str) -> Iterator[tuple[Any, ...]]:
    """Yield their (resnet, attention) pairs and resampling layers in the order of ours."""
    for stage in stages:
        attentions = getattr(stage, "attentions", [None] * len(stage.resnets))
        yield from zip(stage.resnets, attentions, strict=True)
        for layer in getattr(stage, resample) or ():
            yield (layer.conv,)


def copy_all(ours: UNet, theirs: UNet2DModel) -> None:
    copy(ours.embed_1, theirs.time_embedding.linear_1)
    copy(ours.embed_2, theirs.time_embedding.linear_2)
    copy(ours.conv_in, theirs.conv_in)
    copy(ours.norm_out, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)
    copy_block(ours.mid_1, theirs.mid_block.resnets[0], theirs.mid_block.attentions[0])
    copy_block(ours.mid_2, theirs.mid_block.resnets[1], None)
    for layers, blocks in [
        (ours.down, blocks_of(theirs.down_blocks, "downsamplers")),
        (ours.up, blocks_of(theirs.up_blocks, "upsamplers")),
    ]:
        for layer, target in zip(layers, blocks, strict=True):
            if isinstance(layer, Block):
                copy_block(layer, *target)
            else:
                assert isinstance(layer, Downsample | Upsample)
                copy(layer.conv, *target)


@torch.no_grad()
def outputs(ours: UNet, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():  # at its own initialisation the output is almost zero
        parameter.normal_(0, 0.05, generator=generator)
    theirs = diffusers_unet(ours).to(x.dtype)
    copy_all(ours, theirs)
    ours.to(x.dtype).eval()
    return ours(x, t), theirs.eval()(x, t).sample


@pytest.mark.parametrize("arguments", [CIFAR10, (1, 2, 32, (1, 2, 3), 1, (0, 2), 0.0, 0, 1)])
def test_network_is_the_same(arguments: tuple[Any, ...]) -> None:
    ours = UNet(*arguments)
    x = torch.randn(2, ours.in_channels, 32, 32, dtype=torch.float64)
    mine, other = outputs(ours, x, torch.tensor([3, 871]))
    assert other.abs().max() > 0.1
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_network_is_the_same_at_256_pixels() -> None:
    ours = UNet(*PIXELS_256)
    mine, other = outputs(ours, torch.randn(1, 3, 256, 256), torch.tensor([500]))
    assert (mine - other).abs().max() <= 1e-4 * other.abs().max()


PREDICTION_TYPES: dict[Prediction, str] = {
    "noise": "epsilon",
    "x_0": "sample",
    "v": "v_prediction",
}  # they have no mu


@pytest.mark.parametrize(
    ("prediction", "variance", "zero_terminal_snr"),
    [
        ("noise", "fixed_small", False),
        ("noise", "fixed_large", False),
        ("noise", "learned_range", False),
        ("x_0", "learned_range", False),
        ("v", "learned_range", False),
        # where theirs divides by 0 for noise, and ours refuses it
        ("x_0", "fixed_small", True),
        ("v", "learned_range", True),
    ],
)
def test_ancestral_chain_is_the_same(
    golden: Golden,
    prediction: Prediction,
    variance: Variance,
    zero_terminal_snr: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    betas = make_betas("linear", 1000)
    if zero_terminal_snr:
        betas = rescale_to_zero_snr(betas)
    scheduler = DDPMScheduler(
        trained_betas=betas.numpy(),
        variance_type=variance,
        clip_sample=True,
        prediction_type=PREDICTION_TYPES[prediction],
    )
    # Their tables are float32; in float64 the comparison can be strict.
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.betas = betas
    scheduler.alphas = 1 - betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    net = golden.net_for(variance)
    x = golden["noise_2"]
    for t in scheduler.timesteps.tolist():
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_, t=t, **__: golden.chain_noise(t),
        )
        output = net(x, torch.full((3,), t))
        x = scheduler.step(output, t, x).prev_sample

    def draws() -> Iterator[Tensor]:
        yield golden["noise_2"]
        for t in range(999, 0, -1):
            yield golden.chain_noise(t)

    process = Process(betas, variance, prediction=prediction)
    *_, last = DDPMSampler()(net, process, draws().__next__)
    torch.testing.assert_close(last.x_prev, x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_rescaled_betas_are_the_same(schedule: Schedule) -> None:
    betas = make_betas(schedule, 1000)
    theirs = rescale_zero_terminal_snr(betas.clone())
    torch.testing.assert_close(rescale_to_zero_snr(betas), theirs, rtol=1e-9, atol=1e-12)


def test_v_is_the_same(golden: Golden) -> None:
    process, t = Process(make_betas("linear", 1000), prediction="v"), golden["t"].long()
    scheduler = DDPMScheduler(trained_betas=process.betas.numpy())
    scheduler.alphas_cumprod = process.alphas_cumprod
    theirs = scheduler.get_velocity(golden["x_0"], golden["noise"], t)
    torch.testing.assert_close(
        process.v(golden["x_0"], t, golden["noise"]), theirs, rtol=1e-9, atol=1e-12
    )


def test_ddim_chain_is_the_same(golden: Golden) -> None:
    process = Process(make_betas("linear", 1000))
    scheduler = DDIMScheduler(
        trained_betas=make_betas("linear", 1000).numpy(), set_alpha_to_one=True
    )
    scheduler.alphas_cumprod = process.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(50)  # 980, 960, ..., 0
    x = golden["noise"]
    for t in scheduler.timesteps.tolist():
        output = golden.net(x, torch.full((3,), t))
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample

    respaced = process.respace(torch.arange(0, 1000, 20))
    draws = iter([golden["noise"]])
    *_, last = DDIMSampler(50)(golden.net, respaced, draws.__next__)
    torch.testing.assert_close(last.x_prev, x, rtol=1e-9, atol=1e-12)
