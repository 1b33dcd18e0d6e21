"""Class conditioning and guidance: the network, training, sampling, judging, what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning import DDPM, UNet
from ddpm_lightning.callbacks import EMA, Checkpoints
from ddpm_lightning.checkpoints import file_sha256
from ddpm_lightning.commands.pictures import open_subject, sampling_bar
from ddpm_lightning.commands.progressive import draw_rows
from ddpm_lightning.commands.shared_latents import go_on, run_chains
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.data.labels import read_labels
from ddpm_lightning.data.sources import open_source
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import make_class_grid, make_grid
from ddpm_lightning.randomness import Stream, derive_seed, hash_uniform
from ddpm_lightning.samplers import (
    DDIMSampler,
    DDPMSampler,
    Guidance,
    Guided,
    HeunSampler,
    Start,
    count_evaluations,
    make_guidance,
)
from ddpm_lightning.samplers.guidance import rescaled
from tests.command_line import TINY, grey_pixels, run_here, run_well
from tests.training import (
    Recorder,
    assert_same_training,
    batch_of,
    load,
    make_data,
    make_trainer,
    redraw,
    save,
    tiny_module,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

K = 3
NONE = K
"""No label, as networks are told it."""


class UserNet(nn.Module):
    """A network of the user's own that is told classes."""

    def __init__(self, num_classes: int = K) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.levels = nn.Parameter(torch.linspace(-1, 1, num_classes + 1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * x + self.levels[labels][:, None, None, None]


class Deaf(UNet):
    """Says that it is told classes, and is not."""

    def __init__(self) -> None:
        super().__init__(1, 1, 32, (1,), 1, ())
        self.num_classes = K

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t)


def conditional_net(num_classes: int = K, out_channels: int = 1) -> UNet:
    """A U-Net of one level, its weights redrawn.

    Not of 32 channels: with one channel in a group, the norms cancel what is added per channel.
    """
    return redraw(UNet(1, out_channels, 64, (1,), 1, (), 0.0, num_classes))


def tiny(**options: object) -> DDPM:
    return tiny_module(conditional_net(), image_shape=(1, 8, 8), **options)


def told(batch: Batch, labels: Sequence[int]) -> Batch:
    return batch._replace(labels=torch.tensor(labels))


# --- the network ---------------------------------------------------------------------------------


def test_without_classes_the_network_is_the_one_it_was() -> None:
    torch.manual_seed(0)
    plain = UNet()
    torch.manual_seed(0)
    assert all(map(torch.equal, plain.state_dict().values(), UNet(num_classes=0).parameters()))
    assert "embed_label.weight" not in plain.state_dict()
    extra = set(UNet(num_classes=K).state_dict()) - set(plain.state_dict())
    assert extra == {"embed_label.weight"}


def test_labels_are_added_to_the_embedding_of_the_timestep() -> None:
    net, plain = conditional_net(), conditional_net(0)
    plain.load_state_dict(net.state_dict(), strict=False)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 7, 19])
    assert net.embed_label.weight.shape == (K + 1, 256)
    for label in range(K + 1):
        with torch.no_grad():
            # the embedding's last bias is added as the label is
            plain.embed_2.bias.copy_(net.embed_2.bias + net.embed_label.weight[label])
            ours = net(x, t, torch.full((4,), label))
            torch.testing.assert_close(ours, plain(x, t), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="num_classes is 3"):
        net(x, t)
    with pytest.raises(ValueError, match="num_classes is 0"):
        plain(x, t, t)


# --- training ------------------------------------------------------------------------------------


def test_labels_are_withheld_by_position(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Listening(UserNet):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels)
            return super().forward(x, t, labels)

    for p in (0.0, 0.4):
        module = tiny_module(Listening(), image_shape=(1, 8, 8), label_dropout=p, seed=5)
        module.trainer = make_trainer(tmp_path)
        whole = told(batch_of(400, first=10**9), [0, 1, 2, 1] * 100)
        module.training_step(whole, 0)
        withheld = torch.from_numpy(hash_uniform(5, Stream.LABEL, whole.positions) < p)
        assert whole.labels is not None
        assert torch.equal(seen[-1], torch.where(withheld, NONE, whole.labels))
        assert float(withheld.float().mean()) == pytest.approx(p, abs=0.08)
        part = Batch(whole.images[7:12], whole.positions[7:12], whole.labels[7:12])
        module.training_step(part, 0)
        assert torch.equal(seen[-1], seen[-2][7:12])
        module.validation_step(part, 0)  # which withholds none
        assert torch.equal(seen[-1], whole.labels[7:12])


def test_labels_reach_the_loss() -> None:
    module = tiny()
    batch = batch_of(4)
    first = module.losses(told(batch, [0, 1, 2, 0]), 0)[0]
    second = module.losses(told(batch, [1, 1, 2, 0]), 0)[0]
    assert first[0] != second[0]
    assert torch.equal(first[1:], second[1:])
    with pytest.raises(InputError, match="the images have no labels"):
        module.losses(batch, 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_conditional_training_is_going_on(
    accumulate: int, labelled: Path, tmp_path: Path
) -> None:
    def train(name: str, steps: int, resume: Path | None = None) -> Path:
        recorder, checkpoints = Recorder(), Checkpoints(every_n_steps=3, keep_every_n_steps=1)
        trainer = make_trainer(
            tmp_path / name,
            EMA(0.9),
            recorder,
            checkpoints,
            max_steps=steps,
            accumulate_grad_batches=accumulate,
        )
        module = tiny_module(conditional_net(2), label_dropout=0.5)
        trainer.fit(module, make_data(labelled), ckpt_path=resume)
        return tmp_path / name / "checkpoints"

    whole = train("whole", 6)
    resumed = train("rest", 6, train("start", 3) / "last.ckpt")
    assert_same_training(whole / "last.ckpt", resumed / "last.ckpt")
    weights = load(whole / "last.ckpt")["state_dict"]["net.embed_label.weight"]
    assert (weights != conditional_net(2).embed_label.weight).any(dim=1).all()


# --- guidance ------------------------------------------------------------------------------------


def outputs(
    scale: float, rescale: float = 0.0, variance: str = "fixed_small"
) -> tuple[Tensor, Tensor, Tensor, int]:
    """What a guided network, the conditional and the unconditional one give, and evaluations."""
    channels = 2 if variance == "learned_range" else 1
    net = conditional_net(K, channels).double()
    learned = {"variance": "learned_range", "loss": "hybrid"}
    module = tiny_module(net, **(learned if channels == 2 else {}))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    t = torch.tensor([0, 3, 7, 19])
    labels = torch.tensor([2, 0, 1, 2])
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        guided = Guided(module, labels, Guidance(scale, rescale))(x, t)
        count = len(calls)
        return guided, net(x, t, labels), net(x, t, torch.full_like(labels, NONE)), count


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_guidance_is_the_papers(variance: str) -> None:
    for rescale in (0.0, 0.7):
        guided, cond, _, count = outputs(1, rescale, variance)
        assert torch.equal(guided, cond)
        assert count == Guidance(1, rescale).num_evaluations == 1
    guided, _, uncond, count = outputs(0, 0, variance)
    assert torch.equal(guided, uncond)
    assert count == Guidance(0).num_evaluations == 1

    guided, cond, uncond, count = outputs(2.5, 0, variance)
    assert count == Guidance(2.5).num_evaluations == 2
    torch.testing.assert_close(guided[:, :1], uncond[:, :1] + 2.5 * (cond - uncond)[:, :1])
    assert torch.equal(guided[:, 1:], cond[:, 1:])  # a learned variance is the conditional one
    assert (guided[:, :1] != cond[:, :1]).all()


def test_rescaling_restores_the_contrast() -> None:
    plain, cond, _, _ = outputs(4.0)
    full, cond, uncond, _ = outputs(4.0, 1.0)
    torch.testing.assert_close(full.flatten(1).std(dim=1), cond.flatten(1).std(dim=1))
    part = outputs(4.0, 0.7)[0]
    torch.testing.assert_close(part, 0.7 * full + 0.3 * plain)
    zero, _, uncond, count = outputs(0.0, 1.0)
    assert count == Guidance(0, 1.0).num_evaluations == 2
    torch.testing.assert_close(zero, rescaled(uncond, cond))
    flat = torch.ones(1, 1, 2, 2)
    assert rescaled(flat, flat).isfinite().all()


def test_samples_are_functions_of_seed_and_label() -> None:
    module = tiny()
    sampler = DDIMSampler(5)
    in_turn = module.sample(range(7), sampler)
    labels = [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(in_turn, module.sample(range(7), sampler, labels=labels, guidance=1))
    other = module.sample(range(7), sampler, labels=[0, 1, 2, 0, 1, 2, 1])
    assert torch.equal(in_turn[:6], other[:6])
    assert not torch.equal(in_turn[6], other[6])
    # in a batch of its own, and so with guidance
    for guidance in (None, 3.0):
        whole, alone = (
            module.sample(seeds, sampler, labels=labels, guidance=guidance)
            for seeds, labels in ((range(7), labels), ([5], [2]))
        )
        assert (whole[5].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(in_turn, module.sample(range(7), sampler, guidance=3))
    *_, unlabelled = module.denoise(range(7), sampler)
    *_, zero = module.denoise(range(7), sampler, None, labels, Guidance(0))
    assert torch.equal(unlabelled.x_prev, zero.x_prev)
    strong = module.sample(range(4), sampler, guidance=5, guidance_rescale=0.9)
    assert not torch.equal(strong, module.sample(range(4), sampler, guidance=5))


def test_evaluations_are_counted_twice() -> None:
    process = tiny().process
    sampler = HeunSampler(4)
    once = sampler.count_evaluations(process)
    assert once > 4
    assert count_evaluations(sampler, process, None) == once
    assert count_evaluations(sampler, process, Guidance(1)) == once
    assert count_evaluations(sampler, process, Guidance(1.5)) == 2 * once


def test_users_network_is_told_labels() -> None:
    module = tiny_module(UserNet(), prediction="x_0", image_shape=(1, 8, 8))
    module.check_images((1, 8, 8))
    samples = module.sample(range(4), DDIMSampler(20), labels=[0, 1, 2, 2])
    levels = samples.float().mean(dim=(1, 2, 3))
    assert levels[0] < levels[1] < levels[2]


def test_grid_has_a_row_for_each_class() -> None:
    images = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1).expand(7, 1, 8, 8)
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    rows = torch.cat([images[[0, 3, 6]], images[[1, 4]], white, images[[2, 5]], white])
    assert torch.equal(make_class_grid(images, [0, 1, 2, 0, 1, 2, 0]), make_grid(rows, 3))
    assert torch.equal(make_class_grid(images, None), make_grid(images))
    assert torch.equal(make_class_grid(images, [4] * 7), make_grid(images))
    assert torch.equal(make_class_grid(images, range(7)), make_grid(images))


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, labelled: Path) -> Path:
    """A folder with a conditional run, one without label dropout, and one without classes."""
    folder = tmp_path_factory.mktemp("conditional") / "here"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY.format(source=labelled))
    fit: tuple[object, ...] = ("fit", "--config", "tiny.yaml", "--trainer.max_steps", 5)
    fit += ("--model.net.base_channels", 64)  # see conditional_net
    judged: tuple[object, ...] = (
        "--fid.every_n_steps",
        5,
        "--fid.num_images",
        6,
        "--fid.num_steps",
        2,
    )
    judged += ("--fid.extractor", "tests.extractors.Small", "--fid.guidance", 3)
    classes = ("--model.net.num_classes", 2)
    options = ("--samples.guidance", 2, "--samples.every_n_steps", 5, "--samples.num_images", 5)
    told = run_well(folder, *fit, *classes, *options, *judged, "--run_dir", "run")
    assert "classes: 0 dark, 1 light\n" in told.out
    run_well(folder, *fit, *classes, "--model.label_dropout", 0, "--run_dir", "sure")
    run_well(folder, *fit, "--run_dir", "plain")
    return folder


CKPT = "run/checkpoints/last.ckpt"


def test_callbacks_draw_and_judge_by_class(here: Path) -> None:
    model = DDPM.from_checkpoint(here / CKPT)
    expected = model.sample(range(5), DDIMSampler(2), guidance=2)
    grid = make_class_grid(expected, [0, 1, 0, 1, 0])
    difference = (grey_pixels(here / "run/samples/step=5.png").int() - grid.int()).abs()
    assert difference.max() <= 1
    subject = json.loads((here / "run/fid/step=5-ema.json").read_text())["subject"]
    assert subject["guidance"] == {"labels": "seed modulo 2", "scale": 3.0, "rescale": 0.0}
    assert subject["nfe"] == 4


def test_sample(here: Path, tmp_path: Path) -> None:
    model = DDPM.from_checkpoint(here / CKPT)
    steps = ("--sampler", "ddim", "--num_steps", 4, "--accelerator", "cpu", "--seeds", "0-4")
    for name, options, labels, guidance in (
        ("a", (), [0, 1, 0, 1, 0], Guidance()),
        ("b", ("--labels", "1"), [1] * 5, Guidance()),
        ("c", ("--labels", "1,0-1", "--guidance", 2), [1, 0, 1, 1, 0], Guidance(2)),
        ("d", ("--guidance", 2, "--guidance_rescale", 0.7), [0, 1, 0, 1, 0], Guidance(2, 0.7)),
        ("e", ("--guidance", 0), [0, 1, 0, 1, 0], Guidance(0)),
    ):
        run_well(here, "sample", CKPT, *steps, *options, "--out", tmp_path / name)
        expected = model.sample(
            range(5),
            DDIMSampler(4),
            labels=labels,
            guidance=guidance.scale,
            guidance_rescale=guidance.rescale,
        )
        found = torch.stack([grey_pixels(tmp_path / name / f"00000{i}.png") for i in range(5)])
        assert torch.equal(found, expected)
        grid = grey_pixels(tmp_path / name / "grid.png")
        assert torch.equal(grid, make_class_grid(expected, labels))
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        in_turn = labels[:3] if name == "c" else labels[: 1 if name == "b" else 2]
        assert settings["labels"] == in_turn
        assert settings["guidance"] == {"scale": guidance.scale, "rescale": guidance.rescale}
    # more of the same may be added, others not
    more = ("sample", CKPT, *steps[:-1], "5-6", "--out", tmp_path / "c", "--labels", "1,0-1")
    run_well(here, *more, "--guidance", 2)
    assert run_here(here, *more, "--guidance", 3).status == 2


def test_folder_is_named_by_labels_and_guidance(here: Path) -> None:
    options = ("--num_images", 2, "--num_steps", 2, "--accelerator", "cpu", "--format", "npz")
    told = ("--labels", 1, "--guidance", 1.5, "--guidance_rescale", 0.5, "--gif")
    result = run_well(here, "sample", CKPT, *options, *told)
    folder = here / "run/generated/step=5-ema-ddpm-2-labels1-guidance1.5-rescale0.5"
    assert str(folder.relative_to(here)) in result.out
    with np.load(folder / "samples.npz") as file:
        assert file["labels"].tolist() == [1, 1]
    assert (folder / "denoising.gif").exists()


def test_fid_sweeps_guidance(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command: tuple[object, ...] = (
        "fid",
        CKPT,
        "--extractor",
        "tests.extractors.Small",
        "--num_images",
        6,
    )
    command += ("--num_steps", 2, "--accelerator", "cpu", "--out", out)
    result = run_well(here, *command, "--guidance", "1,2.5", "--guidance_rescale", 0.7)
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    told = [(row["subject"]["guidance"]["scale"], row["subject"]["nfe"]) for row in rows]
    assert told == [(1.0, 2), (2.5, 4)]
    assert all(row["subject"]["guidance"]["rescale"] == 0.7 for row in rows)
    assert all(row["subject"]["sha256"] == file_sha256(here / CKPT) for row in rows)
    assert len({row["metrics"]["fd_Small"] for row in rows}) == 2
    assert "ddim guidance 2.5 rescale 0.7" in result.out
    head, first, _ = (out / "sweep.csv").read_text().splitlines()
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    assert (cells["guidance"], cells["guidance_rescale"]) == ("1.0", "0.7")
    assert (out / "sweep.png").exists()
    # without any, what is judged is the conditional model, a row of its own beside these
    run_well(here, *command)
    (row,) = json.loads((out / "sweep.json").read_text())["rows"]
    assert row["subject"]["guidance"] == {"labels": "seed modulo 2", "scale": 1.0, "rescale": 0.0}


@pytest.mark.parametrize("run", ["run", "sure"])
def test_test_tells_labels(here: Path, labelled: Path, run: str) -> None:
    checkpoint = f"{run}/checkpoints/last.ckpt"
    arguments = ("--config", f"{run}/config.yaml", "--ckpt_path", checkpoint)
    result = run_well(here, "test", *arguments, "--likelihood.num_images", 1)
    printed = dict(line.split(": ") for line in result.out.splitlines())
    model = DDPM.from_checkpoint(here / checkpoint)
    data = ImageDataModule(str(labelled))
    test_images = data.test_images
    assert test_images is not None
    found = read_labels(open_source(str(labelled)), test_images, num_classes=2)[:1]
    images = torch.from_numpy(test_images[np.arange(1)])
    bounds = [
        float(model.bound(Batch(images, np.arange(1), torch.tensor([label]))).total.mean())
        for label in (found[0], 1 - found[0])
    ]
    printed_bound = float(printed["test/bits_per_dim_ema"])
    assert printed_bound == pytest.approx(bounds[0], rel=1e-5)
    assert printed_bound != pytest.approx(bounds[1], rel=1e-5)


def test_pictures_show_what_sample_gives(here: Path, tmp_path: Path) -> None:
    """A model that has never seen an image without a label draws them, too."""
    checkpoint, seeds = "sure/checkpoints/last.ckpt", [3, 4, 5]
    subject = open_subject(str(here / checkpoint), "ema", DDIMSampler(4), "cpu")
    _, rows = draw_rows(subject, [seeds], {0, 3})
    assert torch.equal(rows[:, -1], subject.model.sample(seeds, DDIMSampler(4)))

    subject = open_subject(str(here / checkpoint), "ema", DDPMSampler(4), "cpu")
    with sampling_bar(0) as bar:
        whole, states = run_chains(subject, seeds, [19], bar)
        samples = go_on(subject, states[:, 0], 19, seeds, 2, 64, bar)
    assert torch.equal(whole, subject.model.sample(seeds, DDPMSampler(4)))
    fresh = [derive_seed(seed, 19, number) for seed in seeds for number in range(2)]
    start = Start(states[:, 0].repeat_interleave(2, dim=0), 19)
    (expected,) = subject.model.batches(
        fresh, DDPMSampler(4), 64, start=start, labels=[1, 1, 0, 0, 1, 1]
    )
    assert torch.equal(samples.flatten(0, 1), expected)

    out = ("--num_images", 2, "--num_steps", 4, "--accelerator", "cpu", "--out")
    small = ("--extractor", "tests.extractors.Small")
    for command in ("progressive", "shared-latents", "neighbours"):
        more = small if command == "neighbours" else ()
        run_well(here, command, CKPT, *more, *out, tmp_path / f"{command}.png")
        record = json.loads((tmp_path / f"{command}.json").read_text())
        assert record["guidance"] == {"labels": "seed modulo 2", "scale": 1.0, "rescale": 0.0}
    run_well(here, "neighbours", checkpoint, *small, *out, tmp_path / "sure.png")
    judged = ("--num_judged", 6, *small, "--sampler", "ddim")
    run_well(here, "progressive", checkpoint, *judged, *out, tmp_path / "judged.png")
    steps = json.loads((tmp_path / "judged.json").read_text())["quality"]["steps"]
    row = ("--num_images", 6, "--num_steps", 4, "--sampler", "ddim", "--accelerator", "cpu")
    run_well(here, "fid", checkpoint, *row, *small, "--out", tmp_path / "fid")
    metrics = json.loads((tmp_path / "fid/record.json").read_text())["metrics"]
    assert steps[-1]["metrics"]["fd_Small"] == pytest.approx(metrics["fd_Small"], rel=1e-6)


def test_likelihood_says_that_it_tells_none(here: Path, tmp_path: Path) -> None:
    options = ("--num_images", 1, "--num_steps", 2, "--accelerator", "cpu", "--out", tmp_path / "o")
    run_well(here, "likelihood", CKPT, *options)
    protocol = json.loads((tmp_path / "o/record.json").read_text())["protocol"]
    assert protocol["labels"] == "none: the unconditional model"


def test_other_commands_tell_no_label(here: Path, labelled: Path, tmp_path: Path) -> None:
    out = ("--num_images", 2, "--num_steps", 3, "--accelerator", "cpu", "--out", tmp_path / "r.png")
    run_well(here, "reconstruct", CKPT, labelled, *out)
    result = run_here(
        here, "reconstruct", "sure/checkpoints/last.ckpt", labelled, *out[:-1], tmp_path / "s.png"
    )
    assert result.status == 2
    assert "label_dropout 0" in result.err
    result = run_well(here, "validate", "--config", "run/config.yaml", "--ckpt_path", CKPT)
    assert "val/loss" in result.out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("sample plain/checkpoints/last.ckpt --guidance 2", "guidance 2: the model knows no class"),
        ("sample plain/checkpoints/last.ckpt --guidance_rescale 0.5", "the model knows no classes"),
        ("sample plain/checkpoints/last.ckpt --labels 1", "labels: the model knows no classes"),
        (f"sample {CKPT} --labels 0-2", "labels 2: the model's classes are 0-1"),
        (f"sample {CKPT} --labels x", "--labels x: say something like 0-9 or 0,3,5"),
        (f"sample {CKPT} --labels 1-0", "--labels 1-0: ranges rise"),
        (f"sample {CKPT} --guidance -1", "guidance -1: must be at least 0"),
        (f"sample {CKPT} --guidance nan", "guidance: expected float, got nan"),
        (f"sample {CKPT} --guidance_rescale 1.5", "guidance_rescale 1.5: must lie in [0, 1]"),
        ("sample sure/checkpoints/last.ckpt --guidance 2", "guidance 2: the model was trained wit"),
        ("sample sure/checkpoints/last.ckpt --guidance 0", "guidance 0: the model was trained wit"),
        ("fid plain/checkpoints/last.ckpt --guidance 2", "guidance 2: the model knows no classes"),
        (f"fid {CKPT} --guidance 1,x", "--guidance 1,x: say something like 2 or 1,1.5,2"),
        (f"fid {CKPT} --guidance 1,1.0", "names a number twice"),
        ("fit --config tiny.yaml --samples.guidance 2", "--samples.guidance 2: the model knows no"),
        ("fit --config tiny.yaml --model.net.num_classes 3", "has 2 classes; give --model.net.num"),
        ("fit --config tiny.yaml --model.net.num_classes 1", "has 2 classes; give --model.net.num"),
        ("fit --config tiny.yaml --model.net.num_classes -1", "num_classes must be at least 0"),
        ("fit --config tiny.yaml --model.label_dropout 1", "label_dropout must lie in [0, 1)"),
        (
            f"fit --config tiny.yaml --model.net.base_channels 64 --ckpt_path {CKPT} --run_dir new",
            "written with model.net.init_args.num_classes = 2, but this command has 0",
        ),
    ],
)
def test_refused_in_one_line(here: Path, command: str, told: str) -> None:
    result = run_here(here, *command.split())
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert told in result.err


def test_refused_by_the_library(here: Path) -> None:
    module = tiny()
    with pytest.raises(InputError, match="labels: 2 of them for 3 seeds"):
        list(module.denoise(range(3), DDIMSampler(2), None, [0, 1]))
    with pytest.raises(InputError, match="guidance 2: needs labels"):
        list(module.denoise(range(3), DDIMSampler(2), guidance=Guidance(2)))
    with pytest.raises(InputError, match=r"labels -1: the model's classes are 0-2"):
        module.sample([0], labels=[-1])
    for scale in (float("inf"), float("nan"), -0.5):
        with pytest.raises(InputError, match="must be at least 0, and finite"):
            Guidance(scale)
    assert make_guidance(None, None) is None
    assert make_guidance(None, 0.5) == Guidance(1.0, 0.5)
    sure = DDPM.from_checkpoint(here / "sure/checkpoints/last.ckpt")
    assert len(sure.sample(range(2), DDIMSampler(2))) == 2
    with pytest.raises(InputError, match="label_dropout 0"):
        sure(torch.zeros(1, 1, 8, 8), torch.tensor([3]))
    with pytest.raises(InputError, match=r"cannot be called as net\(x, t, labels\)"):
        tiny_module(Deaf()).check_images((1, 8, 8))


def test_checkpoints_of_version_2_load_and_go_on(here: Path) -> None:
    again: tuple[object, ...] = ("fit", "--config", "tiny.yaml", "--model.net.base_channels", 64)
    as_was = ("--model.net.group_channels", 1)
    run_well(here, *again, *as_was, "--trainer.max_steps", 5, "--run_dir", "as was")
    written = "as was/checkpoints/last.ckpt"
    checkpoint = load(here / written)
    checkpoint["format_version"] = 2
    del checkpoint["hyper_parameters"]["label_dropout"]
    arguments = checkpoint["hyper_parameters"]["net"]["init_args"]
    del arguments["num_classes"], arguments["group_channels"]
    save(checkpoint, here / "old.ckpt")
    model = DDPM.from_checkpoint(here / "old.ckpt")
    assert (model.num_classes, model.label_dropout) == (0, 0.1)
    assert isinstance(model.net, UNet)
    assert model.net.group_channels == 1
    new = DDPM.from_checkpoint(here / written)
    assert torch.equal(model.sample([3]), new.sample([3]))
    assert model.hyper_parameters() == new.hyper_parameters()
    again += ("--trainer.max_steps", 6)
    result = run_here(here, *again, "--ckpt_path", "old.ckpt")
    assert result.status == 2
    assert "give --model.net.init_args.group_channels 1" in result.err
    for name, path in (("from old", "old.ckpt"), ("from new", written)):
        run_well(here, *again, *as_was, "--ckpt_path", path, "--run_dir", name)
    last = "checkpoints/last.ckpt"
    assert_same_training(here / "from old" / last, here / "from new" / last)
