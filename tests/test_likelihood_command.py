"""likelihood, and bits/dim in test: what they compute, write, go on with and refuse."""

import csv
import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm_lightning import DDPM
from ddpm_lightning.callbacks import EMA, Likelihood
from ddpm_lightning.checkpoints import Weights, file_sha256
from ddpm_lightning.commands import likelihood as under_test
from ddpm_lightning.commands.likelihood import summarise
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.diffusion.likelihood import Bound, bound_terms, prior_bits_per_dim, vlb_term
from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.timesteps import space_timesteps
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_float
from ddpm_lightning.module import VALIDATION_SEED
from ddpm_lightning.networks import UNet
from ddpm_lightning.randomness import Stream, hash_indices
from tests.command_line import Result, run_here, run_process, train, tree
from tests.conftest import NUM_VAL
from tests.test_bad_input import assert_refused
from tests.test_diffusion import process as make_process
from tests.test_likelihood import INTERIOR, normal_quantiles, pixels
from tests.training import (
    MemoryLogger,
    batch_of,
    load,
    make_data,
    make_trainer,
    redraw,
    save,
    tiny_module,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), pictures) / "checkpoints" / "last.ckpt"


def likelihood(cwd: Path, checkpoint: Path, *arguments: object) -> Result:
    result = run_here(cwd, "likelihood", checkpoint, "--accelerator", "cpu", *arguments)
    assert result.status == 0, result.err
    return result


def read(folder: Path) -> Any:
    return json.loads((folder / "record.json").read_text())


def table(file: Path) -> tuple[list[str], NDArray[np.float64]]:
    """The head of a CSV file and its rows."""
    head, *rows = csv.reader(file.read_text().splitlines())
    return head, np.array(rows, dtype=np.float64)


def images_of(folder: Path) -> Tensor:
    arrays = [np.array(Image.open(file))[None] for file in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(arrays))


@torch.no_grad()
def terms_by_hand(model: DDPM, process: Process, image: Tensor, place: int, seed: int) -> Tensor:
    """The terms of one uint8 [C, H, W], the last t first, float64 [T]."""
    key = int(hash_indices(seed, Stream.NOISE, [place])[0]) % 2**32
    generator = torch.Generator().manual_seed(key)
    x_0, terms = to_float(image)[None], []
    for index in reversed(range(process.num_timesteps)):
        t = torch.tensor([index])
        x_t = process.q_sample(x_0, t, torch.empty(x_0.shape).normal_(generator=generator))
        output = model.net(x_t, process.timesteps[t])
        terms.append(vlb_term(process, output, x_0, x_t, t, "static"))
    return torch.cat(terms).double()


# --- known networks ------------------------------------------------------------------------------


class Oracle:
    """A network that knows the noise, which it draws itself."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.noise


@pytest.mark.parametrize(
    ("variance", "mismatch"), [("fixed_large", 0.4864192300440924), ("fixed_small", 0.0)]
)
@pytest.mark.parametrize(
    ("level", "l_0"), [(INTERIOR, 1.3056651452870642), (255, 0.5099078789849962)]
)
def test_the_true_noise(variance: Variance, mismatch: float, level: int, l_0: float) -> None:
    noise = torch.tensor([[[[0.7, -1.3]]]], dtype=torch.float64)
    x_0, process = pixels(level, 2), make_process(variance=variance)
    metrics = summarise(bound_terms(Oracle(noise), process, x_0, lambda: noise))
    assert metrics["rate_terms"] == pytest.approx(mismatch, rel=1e-9, abs=1e-12)
    assert metrics["l_0"] == pytest.approx(l_0, rel=1e-9)
    prior = float(prior_bits_per_dim(process, x_0))
    assert metrics["prior"] == pytest.approx(prior, rel=1e-12)
    assert metrics["bits_per_dim"] == pytest.approx(mismatch + l_0 + prior, rel=1e-9)
    assert "standard_error" not in metrics


@pytest.mark.parametrize(
    ("variance", "bound"), [("fixed_large", 16.50928), ("fixed_small", 17.19071)]
)
def test_a_network_that_says_nothing(variance: Variance, bound: float) -> None:
    """Its mean over the noise, as in test_likelihood.py, in one pass over all t."""
    noise = normal_quantiles(4_000)
    noise /= noise.square().mean().sqrt()  # of the quantiles the tails are missing
    process, x_0 = make_process(variance=variance), pixels(INTERIOR, 4_000)
    found = bound_terms(
        lambda x_t, t: torch.zeros_like(x_t), process, x_0, lambda: noise, clip="none"
    )
    metrics = summarise(found)
    assert metrics["l_0"] == pytest.approx(2.51779, abs=5e-4)
    assert metrics["l_0"] + metrics["rate_terms"] == pytest.approx(bound, abs=5e-4)


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("variance", get_args(Variance))
def test_every_prediction_and_variance(prediction: Prediction, variance: Variance) -> None:
    """As by hand, image by image, with all timesteps and with some."""
    channels = 2 if variance.startswith("learned") else 1
    net = redraw(UNet(1, channels, 32, (1,), 1, ()))
    # a learned variance needs a bound, and so does the mean
    loss: Any = "simple" if channels == 1 else "hybrid" if prediction != "mu" else "vlb"
    model = tiny_module(net, prediction=prediction, variance=variance, loss=loss).eval()
    batch = batch_of(2, first=5)
    few = model.process.respace(space_timesteps(20, 4))
    for process in (None, few) if variance != "learned" else (None,):
        bound = model.bound(batch, process)
        for place, image, terms in zip((5, 6), batch.images, bound.terms, strict=True):
            ours = process or model.process
            known = terms_by_hand(model, ours, image, place, VALIDATION_SEED)
            assert torch.allclose(terms.flip(0).double(), known, rtol=1e-3, atol=1e-6)
            assert known.isfinite().all()
    if variance == "learned":
        with pytest.raises(InputError, match="variance learned: the network knows"):
            model.bound(batch, few)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "split", "count", "steps"),
    [
        ("", "test", NUM_VAL, 20),
        ("--split val --num_images 3 --weights raw --num_steps 20", "val", 3, 20),
        ("--split train --num_images 5 --num_steps 4 --seed 8 --batch_size 2", "train", 5, 4),
        ("--split test --num_images 1 --num_steps 1 --source {pictures}", "test", 1, 1),
    ],
)
def test_numbers_tables_and_record(
    tmp_path: Path,
    checkpoint: Path,
    pictures: Path,
    options: str,
    split: str,
    count: int,
    steps: int,
) -> None:
    arguments = options.format(pictures=pictures).split()
    result = likelihood(tmp_path, checkpoint, *arguments, "--out", "new/out")
    out = tmp_path / "new/out"
    names = {"likelihood.csv", "rate_distortion.png", "record.json", "settings.json", "terms.csv"}
    assert {path.name for path in out.iterdir()} == names

    weights: Weights = "raw" if "raw" in arguments else "ema"
    seed = 8 if "--seed" in arguments else VALIDATION_SEED
    model = DDPM.from_checkpoint(checkpoint, weights)
    process = model.process.respace(space_timesteps(20, steps))
    images = images_of(pictures / ("train" if split == "train" else "val"))[:count]
    terms = torch.stack(
        [terms_by_hand(model, process, image, n, seed) for n, image in enumerate(images)]
    )
    prior = prior_bits_per_dim(process, to_float(images)).double()
    totals = prior + terms.sum(dim=1)

    record = read(out)
    metrics = record["metrics"]
    assert metrics["bits_per_dim"] == pytest.approx(float(totals.mean()), rel=1e-4)
    parts = sum(metrics[name] for name in ("prior", "rate_terms", "l_0"))
    assert metrics["bits_per_dim"] == pytest.approx(parts, rel=1e-14)
    assert metrics["prior"] == pytest.approx(float(prior.mean()), rel=1e-4)
    assert metrics["l_0"] == pytest.approx(float(terms[:, -1].mean()), rel=1e-4)
    if count == 1:
        assert "standard_error" not in metrics
    else:
        error = float(totals.std()) / math.sqrt(count)
        assert metrics["standard_error"] == pytest.approx(error, rel=1e-3)
    assert f"bits/dim: {metrics['bits_per_dim']:.4f}" in result.out
    assert f"L_0 {metrics['l_0']:.5f}" in result.out
    assert f"{count} {split} images" in result.out
    assert ("L_1 to L_" in result.out) == (steps > 1)

    assert record["num_images"] == record["protocol"]["num_images"] == count
    assert record["protocol"]["seed"] == seed
    assert record["subject"]["sha256"] == file_sha256(checkpoint)
    subject = {"weights": weights, "split": split, "num_steps": steps, "source": str(pictures)}
    assert {key: record["subject"][key] for key in subject} == subject

    # from the noisiest timestep down to the first
    visited = process.timesteps.flip(0).tolist()
    head, rows = table(out / "terms.csv")
    assert head == ["t", "term_bits_per_dim", "x_0_mse", "noise_mse"]
    assert rows[:, 0].tolist() == visited
    assert rows[:, 1] == pytest.approx(terms.mean(dim=0).numpy(), rel=1e-3, abs=1e-6)
    head, curve = table(out / "likelihood.csv")
    assert head == ["t", "rate_bits_per_dim", "rmse"]
    assert curve[:, 0].tolist() == visited
    behind = [metrics["prior"] + rows[:row, 1].sum() for row in range(steps)]
    assert curve[:, 1] == pytest.approx(behind, rel=1e-12)
    assert curve[:, 2] == pytest.approx(127.5 * np.sqrt(rows[:, 2]), rel=1e-12)
    with Image.open(out / "rate_distortion.png") as picture:
        assert picture.width > 1000


def test_batches_and_processes_do_not_matter(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processes, of which one has an image less, the tables are the same to the byte."""
    likelihood(tmp_path, checkpoint, "--out", "one", "--batch_size", 2)
    likelihood(tmp_path, checkpoint, "--out", "all")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = (checkpoint, "--accelerator", "cpu", "--devices", 2, "--batch_size", 2)
    result = run_process(tmp_path, "likelihood", *arguments, "--out", "two")
    assert result.status == 0, result.err
    assert result.out.count("bits/dim") == 1
    for name in ("likelihood.csv", "terms.csv"):
        one, two = ((tmp_path / out / name).read_bytes() for out in ("one", "two"))
        assert one == two, name
        rows = [table(tmp_path / out / name)[1] for out in ("one", "all")]
        assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-6)
    one, two, all_ = (read(tmp_path / out) for out in ("one", "two", "all"))
    assert one["metrics"] == two["metrics"]
    assert one["protocol"] == two["protocol"] == all_["protocol"]
    assert two["subject"]["world_size"] == 2
    assert one["metrics"] == pytest.approx(all_["metrics"], rel=1e-5)
    assert run_here(tmp_path, "fid", "--compare", "one/record.json", "all/record.json").status == 0


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--batch_size", 2, "--out")
    whole = likelihood(tmp_path, checkpoint, *arguments, "whole")
    made: list[int] = []
    bound = DDPM.bound

    def counted(model: DDPM, batch: Batch, *others: Any, **more: Any) -> Bound:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(int(batch.positions[0]))
        return bound(model, batch, *others, **more)

    monkeypatch.setattr(DDPM, "bound", counted)
    stopped = run_here(
        tmp_path, "likelihood", checkpoint, "--accelerator", "cpu", *arguments, "halves"
    )
    assert stopped.status == 130
    assert not (tmp_path / "halves/record.json").exists()
    made.remove(2)
    (tmp_path / "halves/parts/000002.npz").unlink()
    made.remove(4)  # stays
    again = likelihood(tmp_path, checkpoint, *arguments, "halves")
    assert made == [0, 2, 6]  # the others are there
    assert again.out.replace("halves", "whole") == whole.out
    for name in ("likelihood.csv", "terms.csv"):
        one, other = ((tmp_path / out / name).read_bytes() for out in ("whole", "halves"))
        assert one == other, name
    # whole: nothing is computed or written again
    before = tree(tmp_path / "halves")
    assert likelihood(tmp_path, checkpoint, *arguments, "halves").out == again.out
    assert made == [0, 2, 6]
    assert tree(tmp_path / "halves") == before


def test_its_own_folder(tmp_path: Path, checkpoint: Path) -> None:
    options = ("--num_images", 2, "--num_steps", 2, "--weights", "raw")
    likelihood(tmp_path, checkpoint, *options, "--split", "val")
    run = checkpoint.parent.parent
    folder = run / "likelihood" / "step=10-raw-val-2-2"
    assert read(folder)["subject"]["split"] == "val"
    result = run_here(tmp_path, "likelihood", checkpoint, *options, "--split", "val", "--seed", 1)
    assert_refused(result, "holds a likelihood with seed 20200619, not 1; choose another")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("missing.ckpt", "missing.ckpt: no such checkpoint file"),
        ("{checkpoint} --split tset", "split: expected one of 'train', 'val', 'test', got tset"),
        ("{checkpoint} --source {alone}", "--split test: "),
        ("{checkpoint} --source {alone} --split val", "alone has no such images; take --split tra"),
        ("{checkpoint} --source nowhere/x", "--source nowhere/x: nowhere/x is no folder here"),
        ("{checkpoint} --num_images 8", "--num_images 8: "),
        ("{checkpoint} --num_images 0", "has 1 to 7 test images"),
        ("{checkpoint} --num_steps 21", "num_steps must lie in 1..20, got 21"),
        ("{checkpoint} --num_steps 0", "num_steps must lie in 1..20, got 0"),
        ("{checkpoint} --seed -1", "--seed -1: must lie in 0..4294967295"),
        ("{checkpoint} --batch_size 0", "--batch_size must be at least 1, got 0"),
        ("{checkpoint} --weights emma", "weights: expected one of 'ema', 'raw', got emma"),
        ("{checkpoint} --out there", "--out there: a file; choose a folder"),
        ("{checkpoint} --out full", "--out full: not empty, and nothing is overwritten"),
        ("{checkpoint} --accelerator magic", "--accelerator"),
        ("{alien}", "alien.ckpt: lies in no run's folder; name the images by --source"),
        ("{alien} --source {pictures}", "the bound is not finite: the weights have diverged"),
        ("{shape} --source {pictures}", "only images of one shape are compared"),
    ],
)
def test_refused(
    tmp_path: Path,
    checkpoint: Path,
    pictures: Path,
    alone: Path,
    arguments: str,
    told: str,
) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    content = load(checkpoint)
    content["hyper_parameters"]["image_shape"] = [2, 8, 8]
    save(content, tmp_path / "shape.ckpt")
    content["hyper_parameters"]["image_shape"] = [1, 8, 8]
    for value in content["ema_state_dict"].values():
        value.fill_(float("nan"))
    save(content, tmp_path / "alien.ckpt")
    files = {"alien": tmp_path / "alien.ckpt", "shape": tmp_path / "shape.ckpt"}
    before = tree(tmp_path)
    line = arguments.format(checkpoint=checkpoint, pictures=pictures, alone=alone, **files)
    result = run_here(tmp_path, "likelihood", *line.split())
    if "diverged" in told:  # is found out late
        assert result.status == 2
        assert told in result.err
        assert not list(tmp_path.rglob("record.json"))
        return
    assert_refused(result, told)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A folder of images that has no splits."""
    folder = tmp_path_factory.mktemp("images") / "alone"
    folder.mkdir()
    for file in sorted((pictures / "train").iterdir())[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_learned_variance_of_other_steps_is_refused_at_once() -> None:
    model = tiny_module(UNet(1, 2, 32, (1,), 1, ()), variance="learned", loss="hybrid")
    under_test._check_variance(model.process)
    with pytest.raises(InputError, match="take all timesteps"):
        under_test._check_variance(model.process.respace(space_timesteps(20, 4)))


# --- test ----------------------------------------------------------------------------------------


def test_test_logs_bits_per_dim(tmp_path: Path, checkpoint: Path, pictures: Path) -> None:
    """Of the first five of seven images, in batches of two; of both kinds of weights."""
    run = checkpoint.parent.parent
    arguments = ("--config", run / "config.yaml", "--ckpt_path", checkpoint)
    result = run_here(tmp_path, "test", *arguments, "--likelihood.num_images", 5)
    assert result.status == 0, result.err
    printed = dict(line.split(": ") for line in result.out.splitlines())
    names = {"test/bits_per_dim": "raw", "test/bits_per_dim_ema": "ema"}
    assert printed.keys() == {"test/loss", "test/loss_ema", *names}
    images = images_of(pictures / "val")[:5]
    batch = Batch(images, np.arange(5))
    for name, weights in names.items():
        model = DDPM.from_checkpoint(checkpoint, weights)  # type: ignore[arg-type]
        known = float(model.bound(batch).total.mean())
        assert float(printed[name]) == pytest.approx(known, rel=1e-5)
        out = f"of-{weights}"
        options = ("--num_images", 5, "--weights", weights, "--out", out)
        likelihood(tmp_path, checkpoint, *options)  # the same number, from the command
        assert read(tmp_path / out)["metrics"]["bits_per_dim"] == pytest.approx(known, rel=1e-5)


def test_no_random_state_is_touched(tmp_path: Path, pictures: Path) -> None:
    """Beyond what Lightning and its loaders do to it."""
    states = []
    for num_images in (0, 3):
        logger = MemoryLogger()
        trainer = make_trainer(tmp_path, EMA(0.0), Likelihood(num_images), logger=logger)
        torch.manual_seed(1)
        trainer.test(tiny_module(), make_data(pictures), verbose=False)
        assert set(logger.scalars) == ({"test/bits_per_dim"} if num_images else set())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    with pytest.raises(InputError, match=r"--likelihood.num_images -1: must be at least 0"):
        Likelihood(-1)
