"""Every shipped experiment: parsed, built, and one step of each distinct network."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ddpm_lightning.callbacks import EMA
from ddpm_lightning.checkpoints import build
from ddpm_lightning.cli import CLI
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.module import DDPM
from tests.command_line import run_here

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))

# The paper's settings (appendix B): steps, batch, rate, flips, variance, dropout, parameters.
PAPER = {
    "cifar10": (800_000, 128, 2e-4, True, "fixed_large", 0.1, 35_746_307),
    "celebahq256": (500_000, 64, 2e-5, True, "fixed_small", 0.0, 113_673_219),
    "lsun_bedroom": (2_400_000, 64, 2e-5, False, "fixed_small", 0.0, 113_673_219),
    "lsun_church": (1_200_000, 64, 2e-5, True, "fixed_small", 0.0, 113_673_219),
    "lsun_cat": (1_800_000, 64, 2e-5, True, "fixed_small", 0.0, 113_673_219),
}


class ParsedOnly(CLI):
    """Parses a command line as `fit` does, and stops there."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def parse(path: Path, monkeypatch: pytest.MonkeyPatch, *overlays: Path) -> Any:
    files = [text for file in (path, *overlays) for text in ("--config", str(file))]
    monkeypatch.setattr(sys, "argv", ["ddpm_lightning", "fit", *files])
    cli = ParsedOnly()
    return cli.config["fit"]


def num_parameters(config: Any) -> int:
    with torch.device("meta"):
        net = build(config.model.net.as_dict())
    return sum(parameter.numel() for parameter in net.parameters())


def take_one_step(config: Any, size: int) -> None:
    # without a warm-up, whose first step has rate 0
    model = DDPM(build(config.model.net.as_dict()), config.model.schedule, lr_warmup_steps=0)
    model.check_images((config.model.net.init_args.in_channels, size, size))
    optimizer = model.configure_optimizers()["optimizer"]
    before = [parameter.clone() for parameter in model.net.parameters()]
    assert model.image_shape is not None
    images = torch.randint(256, (1, *model.image_shape), dtype=torch.uint8)
    labels = torch.tensor([7]) if model.num_classes else None
    losses, _ = model.losses(Batch(images, np.array([3]), labels), seed=0)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert losses.isfinite().all()
    assert any((b != p).any() for b, p in zip(before, model.net.parameters(), strict=True))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_opens_with_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    for line, start in zip(lines, ("# Reproduces: ", "# To expect: ", "# Cost: "), strict=False):
        assert line.startswith(start)
    assert len(lines) < 60


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_parses_and_builds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm_lightning", "fit", "--config", str(path)])
    cli = ParsedOnly()
    config = cli.config["fit"]
    built = cli.parser.instantiate_classes(cli.config)["fit"]
    assert isinstance(built.model, DDPM)
    assert isinstance(built.data, ImageDataModule)
    assert isinstance(built.ema, EMA)
    assert num_parameters(config) == sum(p.numel() for p in built.model.net.parameters())
    for keys in _leaves(yaml.safe_load(path.read_text())):
        assert ".".join(keys) in config, f"{path.name} sets {keys}, which was not taken"


@pytest.mark.parametrize("name", [name for name in PAPER if name != "cifar10"])
def test_experiment_without_its_images_is_refused(name: str, tmp_path: Path) -> None:
    path = EXPERIMENTS[0].with_name(f"{name}.yaml")
    result = run_here(tmp_path, "fit", "--config", path)
    assert result.status == 2
    assert "path/to/" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PAPER)
def test_paper_experiment_has_the_papers_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(EXPERIMENTS[0].with_name(f"{name}.yaml"), monkeypatch)
    model, data = config.model, config.data
    assert (
        config.trainer.max_steps,
        data.batch_size,
        model.optimizer.init_args.lr,
        data.flip,
        model.variance,
        model.net.init_args.dropout,
        num_parameters(config),
    ) == PAPER[name]
    assert model.optimizer.class_path == "torch.optim.Adam"
    assert (model.optimizer.init_args.betas, model.optimizer.init_args.eps) == ((0.9, 0.999), 1e-8)
    assert (model.schedule, model.num_timesteps) == ("linear", 1000)
    assert (model.beta_start, model.beta_end) == (1e-4, 0.02)
    assert (model.lr_warmup_steps, config.trainer.gradient_clip_val) == (5000, 1.0)
    assert (config.ema.decay, config.ema.warmup) == (0.9999, False)


@pytest.mark.parametrize(("name", "size"), [("fashion_mnist", 28), ("cifar10", 32)])
def test_network_takes_a_step(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_one_step(parse(EXPERIMENTS[0].with_name(f"{name}.yaml"), monkeypatch), size)


def test_conditional_overlay_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    base = EXPERIMENTS[0].with_name("fashion_mnist.yaml")
    overlay = base.with_name("fashion_mnist_conditional.yaml")
    plain, config = parse(base, monkeypatch), parse(base, monkeypatch, overlay)
    assert config.samples.guidance == 2
    take_one_step(config, 28)
    config.samples.guidance = None
    assert config.model.net.init_args.pop("num_classes") == 10
    assert plain.model.net.init_args.pop("num_classes") == 0
    for part in ("model", "data", "samples", "ema", "trainer", "checkpoints"):
        assert config[part] == plain[part], part


@pytest.mark.slow
def test_network_takes_a_step_at_256_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    take_one_step(parse(EXPERIMENTS[0].with_name("lsun_cat.yaml"), monkeypatch), 256)


def test_256_pixel_experiments_share_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [
        parse(path, monkeypatch).model.net
        for path in EXPERIMENTS
        if path.stem in PAPER and path.stem != "cifar10"
    ]
    assert all(net == nets[0] for net in nets)


def _leaves(values: dict[str, Any]) -> list[list[str]]:
    leaves = []
    for key, value in values.items():
        below = _leaves(value) if isinstance(value, dict) else [[]]
        leaves += [[key, *keys] for keys in below]
    return leaves
