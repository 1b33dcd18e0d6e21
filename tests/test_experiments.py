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
from ddpm_lightning.cli import CLI, _widen_output
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.module import DDPM
from experiments.ablation import ROWS, Row
from tests.command_line import run_here

FOLDER = Path(__file__).parents[1] / "experiments"
EXPERIMENTS = sorted(
    str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml")
)

# The paper's settings (appendix B): steps, batch, rate, flips, variance, dropout, parameters.
PAPER = {
    "cifar10": (800_000, 128, 2e-4, True, "fixed_large", 0.1, 35_746_307),
    "celebahq256": (500_000, 64, 2e-5, True, "fixed_small", 0.0, 113_673_219),
    "lsun_bedroom": (2_400_000, 64, 2e-5, False, "fixed_small", 0.0, 113_673_219),
    "lsun_church": (1_200_000, 64, 2e-5, True, "fixed_small", 0.0, 113_673_219),
    "lsun_cat": (1_800_000, 64, 2e-5, True, "fixed_small", 0.0, 113_673_219),
}

# What of a model's options a step depends on, besides the network and the optimizer.
OBJECTIVE = (
    "schedule",
    "num_timesteps",
    "beta_start",
    "beta_end",
    "prediction",
    "variance",
    "loss",
)

# Ho et al. 2020, Table 2, from its first row to its last: prediction, loss, variance.
TABLE_2 = {
    "cifar10/mu_bound_learned": ("mu", "vlb", "learned"),
    "cifar10/mu_bound_fixed": ("mu", "vlb", "fixed_large"),
    "cifar10/mu_mse": ("mu", "simple", "fixed_large"),
    "cifar10/noise_bound_learned": ("noise", "vlb", "learned"),
    "cifar10/noise_bound_fixed": ("noise", "vlb", "fixed_large"),
    "cifar10": ("noise", "simple", "fixed_large"),
}
# Nichol & Dhariwal 2021, Table 1 and appendix A: schedule, loss, variance, how t is drawn.
IMPROVED = {
    "improved_diffusion": ("linear", "simple", "fixed_large", "uniform"),
    "improved_diffusion/linear_hybrid": (
        "linear",
        "rescaled_hybrid",
        "learned_range",
        "uniform",
    ),
    "improved_diffusion/linear_vlb": ("linear", "vlb", "learned_range", "loss_second_moment"),
    "improved_diffusion/cosine_simple": ("cosine", "simple", "fixed_large", "uniform"),
    "improved_diffusion/cosine_hybrid": (
        "cosine",
        "rescaled_hybrid",
        "learned_range",
        "uniform",
    ),
    "improved_diffusion/cosine_vlb": ("cosine", "vlb", "learned_range", "loss_second_moment"),
}


class ParsedOnly(CLI):
    """Parses a command line as `fit` does, completes the network, and stops there."""

    def before_instantiate_classes(self) -> None:
        _widen_output(self.config["fit"].model)

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def open_cli(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> CLI:
    """Parse an experiment, or an overlay BASE/NAME on top of its base."""
    files = [FOLDER / f"{name}.yaml"]
    if "/" in name:
        files.insert(0, files[0].parent.with_suffix(".yaml"))
    configs = [argument for file in files for argument in ("--config", str(file))]
    monkeypatch.setattr(sys, "argv", ["ddpm_lightning", "fit", *configs, *options])
    return ParsedOnly()


def parse(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    return open_cli(name, monkeypatch, *options).config["fit"]


def num_parameters(config: Any) -> int:
    with torch.device("meta"):
        net = build(config.model.net.as_dict())
    return sum(parameter.numel() for parameter in net.parameters())


def take_one_step(config: Any, size: int) -> None:
    options = {key: config.model[key] for key in OBJECTIVE}
    # without a warm-up, whose first step has rate 0
    model = DDPM(build(config.model.net.as_dict()), **options, lr_warmup_steps=0)
    model.check_images((config.model.net.init_args.in_channels, size, size))
    optimizer = model.make_optimizer()
    before = [parameter.clone() for parameter in model.net.parameters()]
    assert model.image_shape is not None
    images = torch.randint(256, (1, *model.image_shape), dtype=torch.uint8)
    labels = torch.tensor([7]) if model.num_classes else None
    losses, _ = model.losses(Batch(images, np.array([3]), labels), seed=0)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert losses.isfinite().all()
    assert any((b != p).any() for b, p in zip(before, model.net.parameters(), strict=True))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_opens_with_what_it_is(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    for line, start in zip(lines, ("# Reproduces: ", "# To expect: ", "# Cost: "), strict=False):
        assert line.startswith(start)
    assert len(lines) < 60


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_parses_and_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = open_cli(name, monkeypatch)
    config = cli.config["fit"]
    built = cli.parser.instantiate_classes(cli.config)["fit"]
    assert isinstance(built.model, DDPM)
    assert isinstance(built.data, ImageDataModule)
    assert isinstance(built.ema, EMA)
    assert num_parameters(config) == sum(p.numel() for p in built.model.net.parameters())
    for keys in _leaves(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())):
        assert ".".join(keys) in config, f"{name} sets {keys}, which was not taken"


@pytest.mark.parametrize("name", [name for name in PAPER if name != "cifar10"])
def test_experiment_without_its_images_is_refused(name: str, tmp_path: Path) -> None:
    result = run_here(tmp_path, "fit", "--config", FOLDER / f"{name}.yaml")
    assert result.status == 2
    assert "path/to/" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PAPER)
def test_paper_experiment_has_the_papers_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(name, monkeypatch)
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
    assert (model.prediction, model.loss) == ("noise", "simple")
    assert (model.schedule, model.num_timesteps) == ("linear", 1000)
    assert (model.beta_start, model.beta_end) == (1e-4, 0.02)
    assert (model.lr_warmup_steps, config.trainer.gradient_clip_val) == (5000, 1.0)
    assert (config.ema.decay, config.ema.warmup) == (0.9999, False)


@pytest.mark.parametrize(("name", "size"), [("fashion_mnist", 28), ("cifar10", 32)])
def test_network_takes_a_step(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_one_step(parse(name, monkeypatch), size)


@pytest.mark.parametrize("name", [*TABLE_2, *IMPROVED])
def test_overlay_takes_a_step_with_fewer_channels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = "--model.net.init_args.base_channels=32"
    take_one_step(parse(name, monkeypatch, fewer), 16)


@pytest.mark.parametrize("name", TABLE_2)
def test_rows_of_table_2_differ_in_what_the_paper_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, base = parse(name, monkeypatch), parse("cifar10", monkeypatch)
    model = config.model
    assert (model.prediction, model.loss, model.variance) == TABLE_2[name]
    assert model.net.init_args.out_channels == (6 if model.variance == "learned" else 3)
    for key in ("prediction", "loss", "variance", "net.init_args.out_channels"):
        base.model[key] = model[key]
    assert config.as_dict() == {**base.as_dict(), "config": config.as_dict()["config"]}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_ablation_on_digits_has_the_rows_of_table_2(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm_lightning", "fit", *row.options()])
    model = ParsedOnly().config["fit"].model
    name = "cifar10" if row.name == "noise_simple" else f"cifar10/{row.name}"
    assert (model.prediction, model.loss, model.variance) == TABLE_2[name]


@pytest.mark.parametrize("name", IMPROVED)
def test_rows_of_improved_diffusion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(name, monkeypatch)
    model = config.model
    chosen = (model.schedule, model.loss, model.variance, model.timestep_sampling)
    assert chosen == IMPROVED[name]
    # 1000 / T times the betas of T = 1000
    assert (model.num_timesteps, model.beta_start, model.beta_end) == (4000, 1e-4 / 4, 0.02 / 4)
    assert (model.lr_warmup_steps, config.trainer.gradient_clip_val) == (0, None)
    assert model.prediction == "noise"
    assert (model.optimizer.init_args.lr, config.data.flip) == (1e-4, False)


def test_large_network_has_the_size_of_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("lsun_bedroom/large", monkeypatch)
    assert num_parameters(config) == 255_677_955
    assert config.trainer.max_steps == 1_150_000
    assert not config.data.flip


def test_conditional_overlay_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parse("fashion_mnist", monkeypatch)
    config = parse("fashion_mnist/conditional", monkeypatch)
    assert config.samples.guidance == 2
    take_one_step(config, 28)
    config.samples.guidance = None
    assert config.model.net.init_args.pop("num_classes") == 10
    assert plain.model.net.init_args.pop("num_classes") == 0
    for part in ("model", "data", "samples", "ema", "trainer", "checkpoints"):
        assert config[part] == plain[part], part


@pytest.mark.slow
def test_network_takes_a_step_at_256_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    take_one_step(parse("lsun_cat", monkeypatch), 256)


def test_256_pixel_experiments_share_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [parse(name, monkeypatch).model.net for name in PAPER if name != "cifar10"]
    assert all(net == nets[0] for net in nets)


def _leaves(values: dict[str, Any]) -> list[list[str]]:
    leaves = []
    for key, value in values.items():
        below = _leaves(value) if isinstance(value, dict) else [[]]
        leaves += [[key, *keys] for keys in below]
    return leaves
