"""Weights, curves and samples do not depend on the number of processes that make them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lightning.diffusion.timestep_sampling import HISTORY, TimestepSampling
from tests.children import Seen, seen
from tests.processes import NETWORK, TORCHRUN, TRAINER, Job, two_nodes
from tests.training import BufferedUNet, assert_same, fit_here, flat_state, load, scalars

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

# Seven images to validate make one batch of 16: with two ranks or more, some have none at all.
# Not 32 base channels: with one channel in a group, the group norms cancel the biases before them.
# Their gradients are nothing but rounding then, which Adam scales up to whole learning rates.
OPTIONS = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 20,
    "trainer.log_every_n_steps": 10,
    "trainer.val_check_interval": 10,
    "trainer.enable_progress_bar": "false",
    "trainer.callbacks": f"{Seen.__module__}.{Seen.__name__}",
    "data.batch_size": 16,
    "data.flip": "true",
    "model.net.base_channels": 64,
    "model.net.channel_mults": "[1]",
    "model.net.attention_levels": "[]",
    "model.num_timesteps": 20,
    "model.lr_warmup_steps": 20,
    "samples.every_n_steps": 20,
    "fid.every_n_steps": 0,
    "samples.num_images": 4,
    "samples.num_steps": 5,
}


def options(pictures: Path | str, run: Path, precision: str, **others: Any) -> list[str]:
    values = {
        "data.source": pictures,
        "model.net": f"{BufferedUNet.__module__}.{BufferedUNet.__name__}",
        **OPTIONS,
        "run_dir": run,
        "trainer.precision": precision,
        **{f"trainer.{key}": value for key, value in others.items()},
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def launch(folder: Path, pictures: Path, *arguments: str) -> str:
    """Run a command whose processes the Trainer starts."""
    with Job(folder, pictures, *TRAINER, *arguments) as job:
        return job.succeed()


def assert_equal_runs(ours: Path, theirs: Path, tolerance: float) -> None:
    one, other = (load(run / "checkpoints" / "last.ckpt") for run in (ours, theirs))
    assert one["global_step"] == other["global_step"] == 20
    for key in ("state_dict", "ema_state_dict"):
        distance = (flat_state(one[key]) - flat_state(other[key])).abs().max()
        assert float(distance) <= tolerance, key
    # TensorBoard keeps float32
    for tag in ("train/loss", "train/loss_q1", "train/grad_norm", "val/loss", "val/loss_ema"):
        curve = scalars(ours, tag)
        assert list(curve) == [10, 20], tag
        assert curve == pytest.approx(scalars(theirs, tag), rel=max(1e-5, tolerance)), tag
    assert scalars(ours, "train/lr") == scalars(theirs, "train/lr")
    assert scalars(ours, "train/images_per_second")[20] > 0
    best = [load(run / "checkpoints" / "best.ckpt")["global_step"] for run in (ours, theirs)]
    assert best[0] == best[1]
    ours_seen, theirs_seen = seen(ours), seen(theirs)
    assert ours_seen["positions"].tolist() == list(range(20 * 16))
    assert_same(ours_seen, theirs_seen)  # images, flips, timesteps and noise, bit for bit


def assert_written_once(run: Path, output: str) -> None:
    assert [path.name for path in (run / "samples").iterdir()] == ["step=20.png"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "step=20.ckpt",
    ]
    assert len(list(run.glob("events.*"))) == 1
    assert output.count("run: ") == 2  # at the start and at the end


@pytest.fixture(scope="module")
def cache(pictures: Path) -> Path:
    return pictures.parent / "cache"


@pytest.mark.parametrize(
    ("precision", "tolerance", "sampling"),
    [("32-true", 1e-5, "uniform"), ("64-true", 1e-12, "loss_second_moment")],
)
def test_training_does_not_depend_on_ranks_or_accumulation(
    precision: str,
    tolerance: float,
    sampling: TimestepSampling,
    pictures: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    drawn = ["--model.timestep_sampling", sampling]
    if sampling == "loss_second_moment":  # few timesteps soon have the losses to be drawn by
        drawn += ["--model.num_timesteps", "4", "--samples.num_steps", "4"]
    one, halves, ranks = (tmp_path / name for name in ("one", "halves", "ranks"))
    fit_here(*options(pictures, one, precision), *drawn)
    fit_here(*options(pictures, halves, precision, accumulate_grad_batches=2), *drawn)
    assert_equal_runs(halves, one, tolerance)
    output = launch(
        tmp_path,
        pictures,
        "fit",
        *options(pictures, ranks, precision, devices=2, strategy="ddp"),
        *drawn,
    )
    assert_equal_runs(ranks, one, tolerance)
    assert_written_once(ranks, output)
    if sampling == "loss_second_moment":
        assert_same_draws(ranks, one, tolerance)


def assert_same_draws(ranks: Path, one: Path, tolerance: float) -> None:
    """Each rank remembers the losses of all, which are those of a single process."""
    kept = load(ranks / "checkpoints" / "last.ckpt")["timestep_sampling"]
    for rank in (0, 1):
        assert_same(torch.load(ranks / f"draws-{rank}.pt", weights_only=True), kept)
    theirs = load(one / "checkpoints" / "last.ckpt")["timestep_sampling"]
    assert int(kept["counts"].min()) > HISTORY  # steps have been drawn by them
    assert torch.equal(kept["counts"], theirs["counts"])
    torch.testing.assert_close(kept["losses"], theirs["losses"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("network", [NETWORK])
def test_two_nodes_train_as_one(
    network: str, pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined by torchrun; each node has its own view of the network, where that can be had."""
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    one, nodes = tmp_path / "one", tmp_path / "nodes"
    fit_here(*options(pictures, one, "32-true"))
    arguments = options(
        pictures, nodes, "32-true", num_nodes=2, devices=1, accumulate_grad_batches=2
    )
    with two_nodes(tmp_path, pictures, "fit", *arguments) as jobs:
        outputs = [job.succeed() for job in jobs]
    assert_equal_runs(nodes, one, 1e-5)
    assert_written_once(nodes, "".join(outputs))


@pytest.mark.slow
def test_conditional_training_does_not_depend_on_ranks(
    labelled: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which labels are withheld is a function of the position; so are the labels themselves."""
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    told = ["--model.net.num_classes", "2", "--model.label_dropout", "0.5"]
    told += ["--samples.guidance", "2"]
    one, halves, ranks = (tmp_path / name for name in ("one", "halves", "ranks"))
    fit_here(*options(labelled, one, "64-true"), *told)
    fit_here(*options(labelled, halves, "64-true", accumulate_grad_batches=2), *told)
    assert_equal_runs(halves, one, 1e-12)
    both = options(labelled, ranks, "64-true", devices=2, strategy="ddp")
    output = launch(tmp_path, labelled, "fit", *both, *told)
    assert_equal_runs(ranks, one, 1e-12)
    assert_written_once(ranks, output)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_does_not_depend_on_four_ranks(
    accumulate: int,
    pictures: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    for precision, tolerance in {"32-true": 1e-5, "64-true": 1e-12}.items():
        one, ranks = tmp_path / f"one {precision}", tmp_path / f"ranks {precision}"
        fit_here(*options(pictures, one, precision))
        output = launch(
            tmp_path,
            pictures,
            "fit",
            *options(
                pictures,
                ranks,
                precision,
                devices=4,
                strategy="ddp",
                accumulate_grad_batches=accumulate,
            ),
        )
        assert_equal_runs(ranks, one, tolerance)
        assert_written_once(ranks, output)


def test_samples_do_not_depend_on_ranks(
    pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seeds in batches of four: the second rank has one of them, in a batch of its own."""
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    run = tmp_path / "run"
    fit_here(*options(pictures, run, "32-true", max_steps=2))
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    chosen = ["--seeds", "0-2,70,9", "--batch_size", "4", "--num_steps", "5"]
    shared = ["sample", checkpoint, *chosen, "--accelerator", "cpu"]
    launch(tmp_path, pictures, *shared, "--devices", "2", "--out", "two")
    launch(tmp_path, pictures, *shared, "--devices", "1", "--out", "one")
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert names == [*(f"{seed:06}.png" for seed in (0, 1, 2, 9, 70)), "grid.png"]
    assert sorted(path.name for path in (tmp_path / "two").glob("*.png")) == names
    for name in names:
        one, two = (np.asarray(Image.open(tmp_path / out / name)) for out in ("one", "two"))
        assert np.array_equal(one, two), name
    assert len({(tmp_path / "one" / name).read_bytes() for name in names}) == len(names)
    # a rank without a batch is no error
    few = ["sample", checkpoint, "--num_images", "2", "--num_steps", "2", "--accelerator", "cpu"]
    launch(tmp_path, pictures, *few, "--devices", "2", "--out", "few")
    assert (tmp_path / "few" / "grid.png").exists()


@pytest.mark.slow
def test_ranks_with_nothing_to_do(
    pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three ranks one validates all images, and two draw and judge one each."""
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    one, three = tmp_path / "one", tmp_path / "three"
    few: dict[str, Any] = {
        "data.batch_size": 24,
        "samples.num_images": 2,
        "fid.num_images": 2,
        "fid.num_steps": 2,
    }
    few |= {"fid.every_n_steps": 1, "samples.every_n_steps": 1, "trainer.callbacks": "[]"}
    more = [text for key, value in few.items() for text in (f"--{key}", str(value))]
    line: dict[str, Any] = {"max_steps": 1, "val_check_interval": 1, "log_every_n_steps": 1}
    fit_here(*options(pictures, one, "32-true", **line), *more)
    line |= {"devices": 3, "strategy": "ddp"}
    launch(tmp_path, pictures, "fit", *options(pictures, three, "32-true", **line), *more)
    for tag in ("val/loss", "val/loss_ema", "train/loss", "fd_efficientnet-lite0_2/ema"):
        assert scalars(three, tag) == pytest.approx(scalars(one, tag), rel=1e-5), tag
    grids = [np.asarray(Image.open(run / "samples" / "step=1.png")) for run in (one, three)]
    assert np.array_equal(grids[0], grids[1])


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK])
def test_commands_on_nodes_give_the_same(
    network: str, pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torchrun on two nodes and on one; by the Trainer on more ranks than images, too."""
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    fit_here(*options(pictures, tmp_path / "run", "32-true", max_steps=4))
    checkpoint = "run/checkpoints/step=4.ckpt"
    on_cpu = ("--accelerator", "cpu", "--num_steps", "5", "--batch_size", "4")
    judging = ("--extractor", "efficientnet-lite0", "--reference", str(pictures))
    sample = ("sample", checkpoint, *on_cpu)
    fid = ("fid", checkpoint, *on_cpu, *judging, "--metrics", "fd,kid")
    for command in ((*sample, "--num_images", "7"), (*fid, "--num_images", "7")):
        name = command[0]
        launch(tmp_path, pictures, *command, "--devices", "1", "--out", f"{name}-one")
        nodes = ("--num_nodes", "2", "--devices", "1", "--out", f"{name}-nodes")
        with two_nodes(tmp_path, pictures, *command, *nodes) as jobs:
            for job in jobs:
                job.succeed()
        two = ("--devices", "2", "--out", f"{name}-torchrun")
        with Job(tmp_path, pictures, *TORCHRUN, *command, *two) as job:
            job.succeed()
    images = {path.name: np.asarray(Image.open(path)) for path in tmp_path.glob("sample-one/*.png")}
    assert len(images) == 8
    for other in ("nodes", "torchrun"):
        for name, image in images.items():
            theirs = np.asarray(Image.open(tmp_path / f"sample-{other}" / name))
            assert np.array_equal(theirs, image), name
    values = {out: metrics_of(tmp_path / f"fid-{out}") for out in ("one", "nodes", "torchrun")}
    assert values["nodes"] == pytest.approx(values["one"], rel=1e-6)
    assert values["torchrun"] == pytest.approx(values["one"], rel=1e-6)
    for command in ((*sample, "--num_images", "1"), (*fid, "--num_images", "2")):
        launch(tmp_path, pictures, *command, "--devices", "3", "--out", f"{command[0]}-few")
    assert (tmp_path / "sample-few" / "grid.png").exists()
    assert metrics_of(tmp_path / "fid-few")


def metrics_of(folder: Path) -> dict[str, float]:
    """The distances of the only record in a folder; spreads of subsets are rounding here."""
    metrics = json.loads((folder / "record.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if not name.endswith("_std")}
