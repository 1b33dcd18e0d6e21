"""sample: what it writes, that the library gives the same, that it goes on where it stopped."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from ddpm_lightning import DDPM
from ddpm_lightning.checkpoints import Weights, file_sha256
from ddpm_lightning.commands.sample import parse_seeds, seeds_to_text
from ddpm_lightning.images import comment_of, make_grid
from ddpm_lightning.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    HeunSampler,
    Sampler,
)
from tests.command_line import (
    Result,
    ended,
    grey_pixels,
    run_here,
    run_well,
    start_process,
    train,
    tree,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::tqdm.TqdmWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), pictures) / "checkpoints" / "last.ckpt"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def sample(cwd: Path, *arguments: object) -> Result:
    return run_well(cwd, "sample", *arguments, "--accelerator", "cpu")


def images(folder: Path) -> dict[int, torch.Tensor]:
    """The pictures of a folder by their seeds."""
    return {int(path.stem): grey_pixels(path) for path in sorted(folder.glob("[0-9]*.png"))}


def test_pictures_are_named_by_their_seeds(here: Path, checkpoint: Path) -> None:
    result = sample(here, checkpoint, "--seeds", "2,7-9,123456", "--out", "out", "--batch_size", 2)
    assert result.out == "samples: out\ngrid: out/grid.png\n"
    assert "sampling (20 steps an image) 5/5 " in result.err
    names = [f"{seed:06}.png" for seed in (2, 7, 8, 9, 123456)]
    assert set(tree(here / "out")) == {*names, "grid.png", "settings.json"}
    assert json.loads((here / "out/settings.json").read_text()) == {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_sha256(checkpoint),
        "weights": "ema",
        "sampler": {"name": "ddpm", "num_steps": 20, "spacing": "even", "clip": "static"},
        "batch_size": 2,
    }
    stacked = torch.stack(list(images(here / "out").values()))
    assert torch.equal(grey_pixels(here / "out/grid.png"), make_grid(stacked))


@pytest.mark.parametrize(
    ("options", "sampler", "weights"),
    [
        ("", DDPMSampler(), "ema"),
        ("--weights raw", DDPMSampler(), "raw"),
        ("--num_steps 7", DDPMSampler(7), "ema"),
        ("--sampler ddim --num_steps 5", DDIMSampler(5), "ema"),
        ("--sampler ddim --num_steps 20 --eta 0.5 --weights raw", DDIMSampler(20, 0.5), "raw"),
        ("--sampler ddim --spacing ddim5", DDIMSampler(spacing="ddim5"), "ema"),
        ("--spacing 2,3 --clip none", DDPMSampler(spacing="2,3", clip="none"), "ema"),
        ("--sampler dpmpp_2m", DPMSolver2MSampler(), "ema"),
        (
            "--sampler dpmpp_2m_sde --num_steps 4 --spacing even --clip dynamic",
            DPMSolver2MSDESampler(4, spacing="even", clip="dynamic"),
            "ema",
        ),
        (
            "--sampler heun --num_steps 4 --spacing leading --clip static",
            HeunSampler(4, spacing="leading"),
            "ema",
        ),
        ("--sampler heun --spacing trailing --num_steps 4", HeunSampler(4), "ema"),
    ],
)
def test_equals_what_the_library_gives(
    here: Path, checkpoint: Path, options: str, sampler: Sampler, weights: Weights
) -> None:
    sample(here, checkpoint, "--num_images", 5, "--batch_size", 2, "--out", "o", *options.split())
    found = images(here / "o")
    assert list(found) == [0, 1, 2, 3, 4]
    expected = DDPM.from_checkpoint(checkpoint, weights).sample(range(5), sampler, batch_size=2)
    assert torch.equal(torch.stack(list(found.values())), expected)


def test_every_option_changes_the_pictures(here: Path, checkpoint: Path) -> None:
    variants = (
        "",
        "--weights raw",
        "--num_steps 10",
        "--sampler ddim --num_steps 10",
        "--sampler ddim --num_steps 10 --eta 1",
        "--sampler ddim --num_steps 10 --spacing trailing",
        "--sampler ddim --num_steps 10 --clip dynamic",
        "--sampler ddim --num_steps 10 --clip none",
        "--sampler dpmpp_2m --num_steps 10",
        "--sampler dpmpp_2m_sde --num_steps 10",
        "--sampler heun --num_steps 10",
        "--seeds 4-7",
    )
    found = []
    for index, options in enumerate(variants):
        more = options if "--seeds" in options else f"{options} --num_images 4"
        sample(here, checkpoint, "--out", index, *more.split())
        found.append(torch.stack(list(images(here / str(index)).values())))
    for index, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:index]), variants[index]


def test_npz(here: Path, checkpoint: Path) -> None:
    options = (checkpoint, "--seeds", "3,0-2", "--batch_size", 3)
    sample(here, *options, "--out", "png")
    sample(here, *options, "--out", "npz", "--format", "npz")
    assert set(tree(here / "npz")) == {"samples.npz", "grid.png", "settings.json"}
    with np.load(here / "npz/samples.npz") as arrays:
        assert set(arrays) == {"arr_0", "seeds"}
        array, seeds = arrays["arr_0"], arrays["seeds"]
    assert array.dtype == np.uint8
    assert array.shape == (4, 8, 8, 1)
    assert seeds.tolist() == [3, 0, 1, 2]
    found = images(here / "png")
    for index, seed in enumerate(seeds.tolist()):
        assert np.array_equal(array[index], found[seed].permute(1, 2, 0).numpy())
    assert torch.equal(grey_pixels(here / "npz/grid.png"), grey_pixels(here / "png/grid.png"))

    # files of images do not come beside it
    refused = run_here(here, "sample", *options, "--accelerator", "cpu", "--out", "npz")
    assert refused.status == 2
    assert "holds samples with format npz, not None" in refused.err

    # a finished one is left as it is
    before = tree(here)
    again = sample(here, *options, "--out", "npz", "--format", "npz")
    assert again.out == "samples: npz (they were there already)\n"
    assert tree(here) == before


def test_gif_ends_in_the_grid(here: Path, checkpoint: Path) -> None:
    # a bare --gif means true
    sample(here, checkpoint, "--gif", "--num_images", 4, "--out", "out")
    with Image.open(here / "out/denoising.gif") as gif:
        assert isinstance(gif, GifImageFile)
        assert gif.n_frames == 20
        gif.seek(19)
        last = torch.from_numpy(np.array(gif.convert("L")))[None]
        gif.seek(0)
        assert not np.array_equal(np.array(gif.convert("L")), last[0].numpy())
    assert torch.equal(last, grey_pixels(here / "out/grid.png"))
    for value in ("true", "false"):
        sample(here, checkpoint, "--gif", value, "--num_images", 1, "--out", value)
        assert (here / value / "denoising.gif").exists() == (value == "true")


def test_default_folder_is_in_the_run(here: Path, checkpoint: Path) -> None:
    run = here / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, run / "checkpoints/last.ckpt")
    options = ("run/checkpoints/last.ckpt", "--num_images", 1)
    result = sample(here, *options)
    assert result.out.startswith("samples: run/generated/step=10-ema-ddpm-20\n")
    sample(here, *options, "--sampler", "ddim", "--num_steps", 3, "--weights", "raw")
    sample(here, *options, "--sampler", "ddim", "--num_steps", 3, "--eta", "0.5")
    sample(here, *options, "--spacing", "2,3", "--clip", "none")
    sample(here, *options, "--sampler", "heun", "--num_steps", 3, "--spacing", "even")
    assert {path.name for path in (run / "generated").iterdir()} == {
        "step=10-ema-ddpm-20",
        "step=10-ema-ddpm-5-2,3-clipnone",
        "step=10-ema-heun-3-even",
        "step=10-raw-ddim-3",
        "step=10-ema-ddim-3-eta0.5",
    }
    shutil.copy(checkpoint, here / "elsewhere.ckpt")
    result = sample(here, "elsewhere.ckpt", "--num_images", 1)
    assert result.out.startswith("samples: generated/step=10-ema-ddpm-20\n")


def test_seeds_may_be_added_later(here: Path, checkpoint: Path) -> None:
    sample(here, checkpoint, "--num_images", 2, "--batch_size", 2, "--out", "out")
    before = tree(here / "out")
    sample(here, checkpoint, "--num_images", 4, "--batch_size", 2, "--out", "out", "--gif")
    after = tree(here / "out")
    assert set(after) - set(before) == {"000002.png", "000003.png", "denoising.gif"}
    assert after["settings.json"] == before["settings.json"]


def test_goes_on_where_it_stopped(here: Path, checkpoint: Path) -> None:
    options = ("--seeds", "0-7", "--batch_size", 2, "--out", "out", "--gif")
    sample(here, checkpoint, *options)
    complete = tree(here / "out")
    for name in ("000002.png", "000005.png", "grid.png"):
        (here / "out" / name).unlink()
    # named in another way, it is the same checkpoint
    shutil.copy(checkpoint, here / "copy.ckpt")
    sample(here, "copy.ckpt", *options)
    again = tree(here / "out")
    assert {name: content for name, (_, content) in again.items()} == {
        name: content for name, (_, content) in complete.items()
    }
    # whole batches are made anew; what lies in others is not touched
    finished = {"000000.png", "000001.png", "000006.png", "000007.png"}
    for name in (*finished, "denoising.gif", "settings.json"):
        assert again[name] == complete[name]

    # other settings are refused, whatever they are
    for more, key in (("--weights raw", "weights"), ("--num_steps 5", "sampler")):
        result = run_here(here, "sample", "copy.ckpt", *options, *more.split())
        assert result.status == 2
        assert result.err.startswith(f"error: --out out: holds samples with {key} ")
        assert tree(here / "out") == again
    (here / "out/settings.json").write_text("{")
    result = run_here(here, "sample", "copy.ckpt", *options)
    assert result.status == 2
    assert result.err.startswith("error: out/settings.json: cannot be read")


def test_a_killed_process_is_completed(here: Path, checkpoint: Path) -> None:
    options = (checkpoint, "--num_images", 96, "--batch_size", 4, "--out")
    first = here / "killed" / "000000.png"
    with ended(start_process(here, "sample", *options, "killed", "--accelerator", "cpu")):
        deadline = time.monotonic() + 120
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    num_done = len(list((here / "killed").glob("0*.png")))
    assert 0 < num_done < 96
    assert not (here / "killed/grid.png").exists()

    sample(here, *options, "killed")
    sample(here, *options, "whole")
    killed, whole = tree(here / "killed"), tree(here / "whole")
    killed = {name: entry for name, entry in killed.items() if ".part" not in name}
    assert {name: content for name, (_, content) in killed.items()} == {
        name: content for name, (_, content) in whole.items()
    }


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("5", [5]),
        ("0-3", [0, 1, 2, 3]),
        ("3,7,100-102", [3, 7, 100, 101, 102]),
        ("9, 1-2", [9, 1, 2]),
        ("4294967295", [2**32 - 1]),
    ],
)
def test_seeds_are_read_and_written(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text, None) == seeds
    assert parse_seeds(text, len(seeds)) == seeds
    assert seeds_to_text(seeds) == text.replace(" ", "")
    assert parse_seeds(None, 3) == [0, 1, 2]
    assert parse_seeds(None, None) == list(range(64))


def test_a_folder_may_be_called_as_an_option_is(here: Path, checkpoint: Path) -> None:
    sample(here, checkpoint, "--num_images", 1, "--out", "gif")
    assert (here / "gif/000000.png").exists()
    assert not (here / "gif/denoising.gif").exists()


def test_within_the_folder_of_checkpoints(here: Path, checkpoint: Path) -> None:
    (here / "run/checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, here / "run/checkpoints/last.ckpt")
    result = sample(here / "run/checkpoints", "last.ckpt", "--num_images", 1)
    assert result.out.startswith("samples: ../generated/step=10-ema-ddpm-20\n")
    assert (here / "run/generated/step=10-ema-ddpm-20/000000.png").exists()


def test_the_gif_is_of_the_seeds_asked_for(here: Path, checkpoint: Path) -> None:
    options = ("--num_steps", 3, "--out", "out")
    sample(here, checkpoint, "--seeds", "4-5", *options)
    gifs = []
    for seeds in ("0-1", "4-5"):
        sample(here, checkpoint, "--seeds", seeds, *options, "--gif")
        gifs.append((here / "out/denoising.gif").read_bytes())
        assert comment_of(here / "out/denoising.gif") == seeds
    assert gifs[0] != gifs[1]
    written = (here / "out/denoising.gif").stat().st_mtime_ns
    sample(here, checkpoint, "--seeds", "4-5", *options, "--gif")  # as it is there already
    assert (here / "out/denoising.gif").stat().st_mtime_ns == written


def test_a_gif_of_samples_that_are_there(here: Path, checkpoint: Path) -> None:
    options = ("--num_images", 2, "--num_steps", 3, "--format", "npz", "--out", "out")
    sample(here, checkpoint, *options)
    result = run_here(here, "sample", checkpoint, *options, "--accelerator", "cpu", "--gif")
    assert result.status == 2
    assert "sampled without it; give another --out" in result.err
