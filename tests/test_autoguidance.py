"""Guidance by a weaker model: the arithmetic, samples, the command line, what is refused."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from ddpm_lightning import DDPM, UNet
from ddpm_lightning.checkpoints import file_sha256
from ddpm_lightning.commands.told import open_guide
from ddpm_lightning.diffusion.process import Prediction
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import DDIMSampler, Guidance, Guided, HeunSampler
from tests.command_line import TINY, grey_pixels, run_here, run_well
from tests.training import redraw, tiny_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

K = 3


def model_of(seed: int, num_classes: int = 0, channels: int = 1, **options: object) -> DDPM:
    """A model with weights of its own, in float64."""
    # not of 32 channels: with one channel in a group, the norms cancel what a label adds
    net = redraw(UNet(1, channels, 64, (1,), 1, (), num_classes=num_classes), seed).double()
    return tiny_module(net, image_shape=(1, 8, 8), **options).eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0, 3, 7, 19])


# --- the arithmetic ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [0, K])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_model_is_drawn_away_from_its_guide(num_classes: int, scale: float) -> None:
    model, guide = (model_of(seed, num_classes) for seed in (0, 1))
    x, t = inputs()
    labels = torch.tensor([2, 0, 1, 2]) if num_classes else None
    better, worse = model(x, t, labels), guide(x, t, labels)
    assert not torch.allclose(better, worse)
    calls: list[DDPM] = []
    for module in (model, guide):
        module.net.register_forward_hook(lambda *_, module=module: calls.append(module))
    guided = Guided(model, labels, Guidance(scale), guide)(x, t)
    assert calls == {0.0: [guide], 1.0: [model], 2.5: [model, guide]}[scale]
    assert len(calls) == Guidance(scale).num_evaluations
    torch.testing.assert_close(guided, worse + scale * (better - worse))
    if scale < 2:
        assert torch.equal(guided, better if scale else worse)


@torch.no_grad()
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_whatever_is_predicted_x_0_is_guided_alike(prediction: Prediction) -> None:
    model, guide = (model_of(seed, prediction=prediction) for seed in (0, 1))
    x, t = inputs()
    better, worse, guided = (
        model.process.pred_x_0(net(x, t), x, t)
        for net in (model, guide, Guided(model, None, Guidance(1.7), guide))
    )
    torch.testing.assert_close(guided, worse + 1.7 * (better - worse), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_learned_variance_is_the_models_own() -> None:
    model, guide = (
        model_of(seed, channels=2, variance="learned_range", loss="hybrid") for seed in (0, 1)
    )
    x, t = inputs()
    guided = Guided(model, None, Guidance(2), guide)(x, t)
    assert torch.equal(guided[:, 1:], model(x, t)[:, 1:])
    torch.testing.assert_close(guided[:, :1], (2 * model(x, t) - guide(x, t))[:, :1])
    # rescaled, it has the contrast of the model's own
    full = Guided(model, None, Guidance(3, 1.0), guide)(x, t)[:, :1]
    torch.testing.assert_close(full.flatten(1).std(1), model(x, t)[:, :1].flatten(1).std(1))


def test_samples_are_functions_of_seed_and_guide() -> None:
    model, guide, other = (model_of(seed) for seed in (0, 1, 2))
    sampler = DDIMSampler(5)
    plain = model.sample(range(6), sampler)
    guided = model.sample(range(6), sampler, guidance=2, guide=guide)
    assert torch.equal(guided[[3]], model.sample([3], sampler, guidance=2, guide=guide))
    assert torch.equal(
        guided, model.sample(range(6), sampler, batch_size=4, guidance=2, guide=guide)
    )
    assert not torch.equal(guided, plain)
    assert not torch.equal(guided, model.sample(range(6), sampler, guidance=2, guide=other))
    # nothing is gained by what the model knows already
    assert torch.equal(plain, model.sample(range(6), sampler, guidance=1, guide=guide))
    assert torch.equal(plain, model.sample(range(6), sampler, guidance=2, guide=model))
    heun = model.sample(range(2), HeunSampler(4), guidance=1.5, guide=guide)
    assert not torch.equal(heun, model.sample(range(2), HeunSampler(4)))


def test_modes_are_as_before_and_do_not_matter() -> None:
    def made(seed: int) -> DDPM:
        return tiny_module(redraw(UNet(1, 1, 64, (1,), 1, (), 0.5), seed), image_shape=(1, 8, 8))

    model, guide = made(0).eval(), made(1).train()
    state = torch.get_rng_state()
    first, second = (model.sample([1], DDIMSampler(3), guidance=2, guide=guide) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert (model.net.training, guide.net.training) == (False, True)


def test_labels_reach_both() -> None:
    model, guide = (model_of(seed, K, label_dropout=0.0) for seed in (0, 1))
    # neither has seen an image without a label, which guidance by a guide does not need
    ones, twos = (
        model.sample(range(3), DDIMSampler(3), labels=[k] * 3, guidance=0, guide=guide)
        for k in (1, 2)
    )
    assert torch.equal(ones, guide.sample(range(3), DDIMSampler(3), labels=[1] * 3))
    assert not torch.equal(ones, twos)
    heard: list[Tensor] = []
    for module in (model, guide):
        module.net.register_forward_hook(lambda _, inputs, __: heard.append(inputs[2]))
    model.sample(range(3), DDIMSampler(2), labels=[2, 0, 1], guidance=2, guide=guide)
    assert [labels.tolist() for labels in heard] == [[2, 0, 1]] * 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prediction": "v"}, "guide: has prediction v, but the model noise"),
        ({"schedule": "cosine"}, "guide: its schedule is not the model's"),
        ({"num_timesteps": 21}, "guide: its schedule is not the model's"),
        ({"num_classes": K}, "guide: has num_classes 3, but the model 0"),
        (
            {"variance": "learned", "loss": "hybrid", "channels": 2},
            "guide: has learned variances True, but the model False",
        ),
    ],
)
def test_guide_of_another_kind_is_refused(options: dict[str, object], told: str) -> None:
    model, guide = model_of(0), model_of(1, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=told):
        model.sample([0], DDIMSampler(2), guidance=2, guide=guide)


def test_guide_of_other_images_is_refused_and_so_is_one_of_no_strength() -> None:
    model, guide = model_of(0), model_of(1)
    with pytest.raises(InputError, match="guide: say how strongly it guides"):
        model.sample([0], DDIMSampler(2), guide=guide)
    with pytest.raises(InputError, match="guide: say how strongly it guides"):
        model.sample([0], DDIMSampler(2), guidance_rescale=0.7, guide=guide)
    guide.image_shape = (1, 16, 16)
    with pytest.raises(InputError, match=r"guide: has images of \(1, 16, 16\), but the model"):
        model.sample([0], DDIMSampler(2), guidance=2, guide=guide)


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A folder with a run of ten steps, and one that predicts something else."""
    folder = tmp_path_factory.mktemp("guided") / "here"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY.format(source=pictures))
    fit = ("fit", "--config", "tiny.yaml", "--samples.every_n_steps", 0)
    run_well(folder, *fit, "--run_dir", "run", "--trainer.max_steps", 15)
    run_well(folder, *fit, "--run_dir", "noise", "--model.prediction", "noise", "--ema.decay", 0)
    return folder


CKPT = "run/checkpoints/step=10.ckpt"
GUIDE = "run/checkpoints/step=5.ckpt"


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_sample(here: Path, tmp_path: Path, weights: str) -> None:
    model, guide = (DDPM.from_checkpoint(here / name, weights) for name in (CKPT, GUIDE))  # type: ignore[arg-type]
    expected = model.sample(range(4), DDIMSampler(4), guidance=3, guide=guide)
    assert not torch.equal(expected, model.sample(range(4), DDIMSampler(4)))
    command: tuple[object, ...] = ("sample", CKPT, "--sampler", "ddim", "--num_steps", 4)
    command += ("--accelerator", "cpu", "--weights", weights, "--out", tmp_path / "out")
    run_well(here, *command, "--seeds", "0-3", "--guide", GUIDE, "--guidance", 3)
    found = torch.stack([grey_pixels(tmp_path / "out" / f"00000{i}.png") for i in range(4)])
    assert torch.equal(found, expected)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["guidance"] == {"scale": 3.0, "rescale": 0.0}
    assert settings["guide"] == file_sha256(here / GUIDE)
    # more of the same may be added, others not
    run_well(here, *command, "--seeds", "4", "--guide", GUIDE, "--guidance", 3)
    (tmp_path / "other.ckpt").write_bytes((here / "run/checkpoints/step=15.ckpt").read_bytes())
    for options in (("--guide", tmp_path / "other.ckpt", "--guidance", 3), ()):
        other = run_here(here, *command, "--seeds", "5", *options)
        assert other.status == 2
        assert "holds samples with guid" in other.err


def test_folder_is_named_by_the_guide(here: Path) -> None:
    options = ("--num_images", 2, "--num_steps", 2, "--accelerator", "cpu")
    result = run_well(here, "sample", CKPT, *options, "--guide", GUIDE, "--guidance", 2)
    sha256 = file_sha256(here / GUIDE)
    assert f"run/generated/step=10-ema-ddpm-2-guidance2-bystep=5-{sha256[:6]}\n" in result.out


def test_fid_judges_what_is_guided(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command: tuple[object, ...] = ("fid", CKPT, "--extractor", "tests.extractors.Small")
    command += ("--num_images", 6, "--num_steps", 2, "--accelerator", "cpu", "--out", out)
    result = run_well(here, *command, "--guide", GUIDE, "--guidance", "1,2.5")
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    sha256 = file_sha256(here / GUIDE)
    guide = {"path": GUIDE, "sha256": sha256, "step": 5}
    told = [(row["subject"]["guidance"], row["subject"]["nfe"]) for row in rows]
    # at scale 1 there is nothing to guide
    assert told == [("none", 2), ({"scale": 2.5, "rescale": 0.0, "guide": guide}, 4)]
    assert len({row["metrics"]["fd_Small"] for row in rows}) == 2
    assert f"ddim guidance 2.5 by step=5-{sha256[:6]}" in result.out
    head, _, last = (out / "sweep.csv").read_text().splitlines()
    cells = dict(zip(head.split(","), last.split(","), strict=True))
    assert (cells["guidance"], cells["guide"]) == ("2.5", GUIDE)
    assert (out / "sweep.png").exists()
    # what has been judged is not judged again: without a guide, and with the same one elsewhere
    judged = sorted((out / "records").iterdir())
    run_well(here, *command)
    (row,) = json.loads((out / "sweep.json").read_text())["rows"]
    assert row == rows[0]
    moved = tmp_path / "step=5.ckpt"
    moved.write_bytes((here / GUIDE).read_bytes())
    run_well(here, *command, "--guide", moved, "--guidance", "2.5")
    assert sorted((out / "records").iterdir()) == judged
    # the guide itself is not guided
    run_well(here, *command, "--guide", CKPT, "--guidance", "2.5")
    assert json.loads((out / "sweep.json").read_text())["rows"] == [row]
    assert sorted((out / "records").iterdir()) == judged
    # another one under the same name is another row
    moved.write_bytes((here / "run/checkpoints/step=15.ckpt").read_bytes())
    run_well(here, *command, "--guide", moved, "--guidance", "2.5")
    (other,) = json.loads((out / "sweep.json").read_text())["rows"]
    assert other["metrics"] not in [row["metrics"] for row in rows]
    assert len(list((out / "records").iterdir())) == len(judged) + 1


def test_fid_guides_each_of_the_weights_by_its_own(here: Path, tmp_path: Path) -> None:
    command: tuple[object, ...] = ("fid", CKPT, "--extractor", "tests.extractors.Small")
    command += ("--num_images", 6, "--num_steps", 2, "--accelerator", "cpu", "--guide", GUIDE)
    run_well(here, *command, "--guidance", 2, "--weights", "ema,raw", "--out", tmp_path / "both")
    rows = json.loads((tmp_path / "both/sweep.json").read_text())["rows"]
    assert [row["subject"]["weights"] for row in rows] == ["ema", "raw"]
    for row in rows:
        weights = row["subject"]["weights"]
        out = tmp_path / weights
        run_well(here, *command, "--guidance", 2, "--weights", weights, "--out", out)
        assert json.loads((out / "record.json").read_text())["metrics"] == row["metrics"]
    assert rows[0]["metrics"] != rows[1]["metrics"]


def test_a_guide_that_changes_is_noticed(here: Path, tmp_path: Path) -> None:
    guide = tmp_path / "last.ckpt"
    guide.write_bytes((here / GUIDE).read_bytes())
    opened = open_guide(str(guide), 2)
    assert opened is not None
    model = DDPM.from_checkpoint(here / CKPT)
    opened.load("ema", model)
    guide.write_bytes((here / CKPT).read_bytes())
    with pytest.raises(InputError, match=r"last\.ckpt: has changed since it was first read"):
        opened.load("ema", model)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (f"sample {CKPT} --guide {GUIDE}", f"--guide {GUIDE}: say how strongly, such as --guidanc"),
        (f"fid {CKPT} --guide {GUIDE}", f"--guide {GUIDE}: say how strongly, such as --guidance 2"),
        (f"sample {CKPT} --guide {CKPT} --guidance 2", f"--guide {CKPT}: is the checkpoint itself"),
        (f"sample {CKPT} --guide none.ckpt --guidance 2", "none.ckpt: no such checkpoint file"),
        (f"sample {CKPT} --guide tiny.yaml --guidance 2", "tiny.yaml: not a whole checkpoint"),
        (
            "sample noise/checkpoints/last.ckpt --weights raw --guidance 2 --guide " + GUIDE,
            f"--guide {GUIDE}: has prediction v, but the model noise; take an earlier checkpoint",
        ),
        (
            f"fid {CKPT} --guidance 1,2 --weights raw --guide noise/checkpoints/last.ckpt",
            "--guide noise/checkpoints/last.ckpt: has prediction noise, but the model v; take an",
        ),
        (
            f"sample {CKPT} --guidance 2 --guide noise/checkpoints/last.ckpt",
            "noise/checkpoints/last.ckpt: the run kept no EMA weights",
        ),
    ],
)
def test_refused_in_one_line(here: Path, command: str, told: str) -> None:
    result = run_here(here, *command.split(), "--accelerator", "cpu")
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert told in result.err
