"""Counting the network's arithmetic, compiling it, and its layout in memory."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning import DDPM, UNet
from ddpm_lightning.callbacks import EMA, Checkpoints, Curves, curves
from ddpm_lightning.callbacks.utilisation import peak_flops, peak_of
from ddpm_lightning.errors import InputError
from tests.training import (
    MemoryLogger,
    assert_same_training,
    flat_state,
    load,
    make_data,
    make_trainer,
    redraw,
    tiny_module,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class OneConvolution(nn.Module):
    """As a user's own network may be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.conv(x)
        return output


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 156e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("Tesla T4", "32-true", 8.1e12),
        ("NVIDIA L400", "bf16-mixed", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, expected: float | None) -> None:
    assert peak_flops(name, precision) == expected


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_of(torch.device("cpu"), "32-true") is None


def test_a_forward_pass_is_counted() -> None:
    module = tiny_module(OneConvolution())
    module.check_images((1, 8, 12))
    assert module.flops_per_image == 2 * 9 * 8 * 12  # nine products and sums for each pixel


def test_a_forward_pass_is_counted_the_same_with_checkpointing() -> None:
    modules = [tiny_module(UNet(checkpointing=value)) for value in (False, True)]
    for module in modules:
        module.check_images((1, 8, 8))
    assert modules[0].flops_per_image == modules[1].flops_per_image > 0


def test_utilisation_is_logged_where_the_peak_is_known(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "peak_of", lambda device, precision: 5e9)
    logger = MemoryLogger()
    trainer = make_trainer(
        tmp_path, Curves(), max_steps=2, log_every_n_steps=2, logger=logger, precision="32-true"
    )
    module = tiny_module()
    trainer.fit(module, make_data(pictures))
    speed = logger.scalars["train/images_per_second"][2]
    assert module.flops_per_image > 0
    tflops = 3 * module.flops_per_image * speed / 1e12
    assert logger.scalars["train/tflops"][2] == pytest.approx(tflops)
    assert logger.scalars["train/mfu"][2] == pytest.approx(tflops * 1e12 / 5e9)


@pytest.mark.slow
def test_a_compiled_network_trains_as_a_plain_one(pictures: Path, tmp_path: Path) -> None:
    states = []
    for compiles in (False, True):
        torch.manual_seed(0)
        module = tiny_module(UNet(1, 1, 32, (1,), 1, ()), compile=compiles)
        trainer = make_trainer(tmp_path, max_steps=3)
        trainer.fit(module, make_data(pictures))
        assert (module.net._compiled_call_impl is not None) == compiles
        states.append(module.state_dict())
    plain, compiled = states
    assert list(plain) == list(compiled)  # the same names
    assert float((flat_state(plain) - flat_state(compiled)).abs().max()) < 1e-4


def test_compiling_needs_a_compiler(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler, and there is no no-such-comp"):
        make_trainer(tmp_path, max_steps=1).fit(tiny_module(compile=True), make_data(pictures))


def train(
    folder: Path, pictures: Path, channels_last: bool, resume: Path | None = None
) -> tuple[Path, nn.Module, EMA]:
    """Take six steps of a network that is large enough for the layouts to differ."""
    module = tiny_module(
        redraw(UNet(1, 1, 32, (1, 1), 1, ())),
        channels_last=channels_last,
        # where gradients are zero, Adam with its usual eps makes steps of their rounding
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3, eps=1e-3, fused=True),
    )
    ema = EMA(0.9)
    callbacks = (ema, Checkpoints(every_n_steps=0, keep_every_n_steps=3))
    make_trainer(folder, *callbacks, max_steps=6).fit(module, make_data(pictures), ckpt_path=resume)
    return folder / "checkpoints", module.net, ema


def test_training_is_the_same_with_channels_last(pictures: Path, tmp_path: Path) -> None:
    """Of itself bit for bit, across a restart; of the plain layout up to rounding, in any mix."""
    whole = {kind: train(tmp_path / f"{kind}", pictures, kind)[0] for kind in (False, True)}
    for first, then in product(whole, whole):
        folder, start = tmp_path / f"{first}, then {then}", whole[first] / "step=3.ckpt"
        mixed, net, ema = train(folder, pictures, then, start)
        assert is_channels_last(net) == then
        for weight, mean in zip(net.parameters(), ema.average, strict=True):
            assert mean.stride() == weight.stride()
        assert largest_difference(mixed / "step=6.ckpt", whole[False] / "step=6.ckpt") < 1e-6
        if first == then:
            assert_same_training(mixed / "step=6.ckpt", whole[then] / "step=6.ckpt")
    # who reads a checkpoint has the plain layout
    assert not is_channels_last(DDPM.from_checkpoint(whole[True] / "step=6.ckpt").net)


def is_channels_last(net: nn.Module) -> bool:
    return not all(weight.is_contiguous() for weight in net.parameters())


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of the weights, and of their average."""
    pairs = [(load(ours)[key], load(theirs)[key]) for key in ("state_dict", "ema_state_dict")]
    return max(float((flat_state(a) - flat_state(b)).abs().max()) for a, b in pairs)
