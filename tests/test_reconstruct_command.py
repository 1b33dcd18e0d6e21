"""reconstruct: images to noise and back with a checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lightning import DDPM
from ddpm_lightning.commands.reconstruct import without_pure_noise
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.schedules import make_betas
from ddpm_lightning.images import make_grid, to_float, to_uint8
from ddpm_lightning.samplers import DDIMSampler
from tests.command_line import run_here, train, tree
from tests.training import load, save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), pictures) / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("options", "sampler", "weights"),
    [
        ("", DDIMSampler(clip="none"), "ema"),
        (
            "--num_steps 5 --spacing trailing",
            DDIMSampler(5, spacing="trailing", clip="none"),
            "ema",
        ),
        ("--spacing ddim4 --weights raw", DDIMSampler(spacing="ddim4", clip="none"), "raw"),
    ],
)
@torch.no_grad()
def test_pairs_and_their_distance(
    tmp_path: Path,
    checkpoint: Path,
    pictures: Path,
    options: str,
    sampler: DDIMSampler,
    weights: str,
) -> None:
    more = ("--num_images", 5, "--out", "new/pairs.png", "--accelerator", "cpu")
    result = run_here(tmp_path, "reconstruct", checkpoint, pictures, *more, *options.split())
    assert result.status == 0, result.err
    found = re.fullmatch(
        r"mean error: (\d+\.\d{3}) of 255 levels, with (\d+) steps each way\n"
        r"images: new/pairs.png\n",
        result.out,
    )
    assert found, result.out

    model = DDPM.from_checkpoint(checkpoint, weights)  # type: ignore[arg-type]
    files = sorted((pictures / "train").iterdir())[:5]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file)))[None] for file in files])
    process = without_pure_noise(sampler.respace(model.process))
    sampler = DDIMSampler(process.num_timesteps, clip="none")
    *_, latent = sampler.encode(model, process, to_float(images))
    *_, last = sampler(model, process, lambda: latent)
    decoded = to_uint8(last.x_prev)
    error = (decoded.double() - images.double()).abs().mean()
    assert float(found[1]) == pytest.approx(float(error), abs=6e-4)
    assert int(found[2]) == process.num_timesteps < model.process.num_timesteps
    with Image.open(tmp_path / "new/pairs.png") as picture:
        drawn = torch.from_numpy(np.array(picture))[None]
    pairs = torch.stack([images, decoded], dim=1).flatten(0, 1)
    assert torch.equal(drawn, make_grid(pairs, num_columns=8))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("missing.ckpt {pictures}", "missing.ckpt: no such checkpoint file"),
        ("{checkpoint} nowhere/x", "nowhere/x is no folder here"),
        ("{checkpoint} {pictures} --num_steps 21", "num_steps must lie in 1..20, got 21"),
        ("{checkpoint} {pictures} --spacing evn", "spacing evn: none of even"),
        ("{checkpoint} {pictures} --num_images 31", "--num_images 31: "),
        ("{checkpoint} {pictures} --num_images 0", "--num_images 0: "),
        ("{checkpoint} {pictures} --out there.png", "--out there.png: exists, and nothing is ov"),
        ("{checkpoint} {pictures} --eta 1", "no option --eta"),
        ("{checkpoint}", "arguments are required: images"),
        ("{checkpoint} {pictures} --accelerator magic", "--accelerator"),
    ],
)
def test_refused(
    tmp_path: Path, checkpoint: Path, pictures: Path, arguments: str, told: str
) -> None:
    (tmp_path / "there.png").touch()
    before = tree(tmp_path)
    line = arguments.format(checkpoint=checkpoint, pictures=pictures)
    result = run_here(tmp_path, "reconstruct", *line.split())
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert told in result.err
    assert tree(tmp_path) == before


def test_timesteps_of_pure_noise_are_left_out() -> None:
    linear, cosine = Process(make_betas("linear", 1000)), Process(make_betas("cosine", 1000))
    assert without_pure_noise(linear).num_timesteps == 1000
    kept = without_pure_noise(cosine)
    assert 990 <= kept.num_timesteps < 1000
    ratios = (1 / cosine.alphas_cumprod - 1).sqrt()
    assert float(ratios[kept.num_timesteps - 1]) <= 200 < float(ratios[kept.num_timesteps])
    assert torch.equal(kept.alphas_cumprod, cosine.alphas_cumprod[: kept.num_timesteps])


def test_diverged_weights(tmp_path: Path, checkpoint: Path, pictures: Path) -> None:
    content = load(checkpoint)
    for state in ("state_dict", "ema_state_dict"):
        next(iter(content[state].values())).fill_(float("nan"))
    save(content, tmp_path / "bad.ckpt")
    line = ("bad.ckpt", pictures, "--num_images", 2, "--num_steps", 3, "--out", "x.png")
    result = run_here(tmp_path, "reconstruct", *line, "--accelerator", "cpu")
    assert result.status == 2
    assert "not finite" in result.err
    assert not (tmp_path / "x.png").exists()
