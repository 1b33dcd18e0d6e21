"""The commands that draw one labelled picture: what it shows, its record, what is refused."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm_lightning import DDPM
from ddpm_lightning.checkpoints import Weights, file_sha256
from ddpm_lightning.commands import (
    interpolate,
    neighbours,
    progressive,
    quality,
    shared_latents,
)
from ddpm_lightning.commands.progressive import choose_steps
from ddpm_lightning.commands.run_config import RunConfig
from ddpm_lightning.data.batches import Images
from ddpm_lightning.data.items import SplitName
from ddpm_lightning.denoiser import finished_images
from ddpm_lightning.images import centre_crop, to_float, to_uint8
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.metrics.features import Features
from ddpm_lightning.metrics.frechet import frechet_distance
from ddpm_lightning.metrics.judge import Collector
from ddpm_lightning.randomness import NoiseStreams, derive_seed
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import (
    DDIMSampler,
    DDPMSampler,
    Sampler,
    SamplerName,
    Start,
    make_sampler,
)
from tests.command_line import run_here, train, tree
from tests.conftest import NUM_TRAIN, NUM_VAL
from tests.extractors import Small, small
from tests.test_bad_input import refuse

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::tqdm.TqdmWarning"),
]

T = 20
CKPT = "run/checkpoints/last.ckpt"
SMALL = ("--extractor", f"{Small.__module__}.{Small.__name__}")
MODULES = (progressive, shared_latents, interpolate, neighbours)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), pictures)


@pytest.fixture
def here(tmp_path: Path, trained: Path) -> Path:
    """A folder with a copy of the run in it."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder / "run")
    return folder


class Picture(NamedTuple):
    """What a command has drawn."""

    title: str
    rows: Sequence[str]
    groups: Sequence[Group]
    record: dict[str, Any]
    out: str


def draw(here: Path, command: str, *arguments: object) -> Picture:
    """Run a command, see that its picture is that of the groups it laid out, and give those."""
    kept: list[Any] = []

    def keep(title: str, rows: Sequence[str], groups: Sequence[Group]) -> Tensor:
        kept.append((title, rows, groups, labelled_grid(title, rows, groups)))
        return torch.as_tensor(kept[-1][-1])

    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "labelled_grid", keep)
        result = run_here(here, command, CKPT, *arguments, "--accelerator", "cpu")
    assert result.status == 0, result.err
    ((title, rows, groups, expected),) = kept
    places = dict(line.split(": ") for line in result.out.splitlines())
    with Image.open(here / places["picture"]) as image:
        assert torch.equal(torch.from_numpy(np.array(image)), expected[0])
    record = json.loads((here / places["record"]).read_text())
    assert record["command"] == command
    assert record["checkpoint_sha256"] == file_sha256(here / CKPT)
    assert record["step"] == 10
    return Picture(title, rows, groups, record, places["picture"])


def model(here: Path, weights: Weights = "ema") -> DDPM:
    return DDPM.from_checkpoint(here / CKPT, weights)


def held(here: Path) -> dict[SplitName, Tensor]:
    """The images of the run's splits."""
    data = RunConfig.of(Run(here / "run")).training_data()
    sets: dict[SplitName, Images | None] = {
        "train": data.train_images,
        "val": data.val_images,
        "test": data.test_images,
    }
    return {
        name: torch.from_numpy(images[np.arange(len(images))])
        for name, images in sets.items()
        if images is not None
    }


# --- progressive ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sampler", "weights"),
    [
        ("", DDPMSampler(), "ema"),
        ("--weights raw --sampler ddim", DDIMSampler(), "raw"),
        (
            "--sampler ddim --num_steps 7 --eta 0.5 --clip dynamic --num_columns 3",
            DDIMSampler(7, 0.5, clip="dynamic"),
            "ema",
        ),
        ("--num_columns 20", DDPMSampler(), "ema"),
        (
            "--num_columns 1 --num_steps 5 --spacing trailing",
            DDPMSampler(5, spacing="trailing"),
            "ema",
        ),
    ],
)
def test_progressive(here: Path, options: str, sampler: Sampler, weights: Weights) -> None:
    picture = draw(
        here,
        "progressive",
        "--seeds",
        "7,0-1",
        "--batch_size",
        2,
        *options.split(),
        "--out",
        "p.png",
    )
    assert picture.rows == ["seed 7", "seed 0", "seed 1"]
    (group,) = picture.groups
    module, num_steps = model(here, weights), sampler.count_steps(model(here).process)
    # the sample is `sample`'s, bit for bit
    assert group.columns[-1] == "sample"
    assert torch.equal(group.images[:, -1], module.sample([7, 0, 1], sampler, batch_size=2))
    # the others are the last predictions of equal parts of the chain
    num_columns = len(group.columns)
    steps = list(module.denoise([7, 0], sampler))
    for column, name in enumerate(group.columns[:-1]):
        left = (num_columns - 1 - column) * num_steps
        step = steps[num_steps - 1 - -(-left // num_columns)]
        assert name == f"t = {step.t}"
        assert torch.equal(group.images[:2, column], to_uint8(step.pred_x_0))
    assert picture.record["weights"] == weights
    assert picture.record["seeds"] == "7,0-1"
    assert picture.record["sampler"]["num_steps"] == num_steps
    assert picture.record["num_columns"] == num_columns


def test_the_columns_of_the_paper() -> None:
    assert {999 - step for step in choose_steps(1000, 20)} == set(range(0, 1000, 50))
    assert choose_steps(1000, None) == {99 + 100 * part for part in range(10)}
    assert choose_steps(4, None) == {0, 1, 2, 3}
    assert choose_steps(7, 3) == {1, 3, 6}


def test_progressive_judges_what_it_shows(here: Path) -> None:
    """Fig. 10: the predictions of other seeds than those shown, by hand and in three files."""
    sampled = ("--sampler", "ddim", "--num_steps", 6, "--num_columns", 3, "--seeds", "7")
    line = (CKPT, *sampled, *SMALL, "--num_judged", 30, "--batch_size", 16, "--out", "p.png")
    result = run_here(here, "progressive", *line, "--accelerator", "cpu")
    assert result.status == 0, result.err
    *table, last = result.out.splitlines()[2:]
    assert last == "quality: p-quality.csv, p-quality.png"

    module, sampler, reference = model(here), DDIMSampler(6), Collector(small(), ["fd"])
    reference.add(held(here)["train"])
    steps = list(module.denoise(range(30), sampler))
    expected = {}
    for index in (1, 3, 5):
        generated = Collector(small(), ["fd"])
        generated.add(to_uint8(steps[index].pred_x_0))
        moments = generated.finish().moments
        expected[steps[index].t] = frechet_distance(moments, reference.finish().moments)
    record = json.loads((here / "p.json").read_text())
    assert record["num_judged"] == record["protocol"]["num_images"] == 30
    assert record["protocol"]["reference"]["num_images"] == NUM_TRAIN
    judged = {row["t"]: row["metrics"]["fd_Small"] for row in record["quality"]["steps"]}
    assert list(judged) == list(expected)  # from the noise on
    assert judged == pytest.approx(expected, rel=1e-3)  # rounded in other batches
    head, *rows = (here / "p-quality.csv").read_text().splitlines()
    assert head == "t,fd_Small_30"
    assert {int(t): float(fd) for t, fd in (row.split(",") for row in rows)} == judged
    assert table[0].split() == ["t", "fd_Small_30"]
    assert table[1].split() == [str(steps[1].t), f"{judged[steps[1].t]:.5g}"]
    with Image.open(here / "p-quality.png") as chart:
        assert chart.width > 500
    assert len(record["quality"]["warnings"]) == 0

    for options, told in (
        ("--num_judged 31", "p.png: there is one with num_judged 30, not 31"),
        ("--num_judged 1", "1 images are too few for the metric fd"),
        ("--reference nowhere/x", "--reference nowhere/x: "),
        ("--extractor inceptio", "no extractor inceptio"),
    ):
        refuse(here, f"progressive {' '.join(map(str, line))} {options}", told)
    (here / "p.json").unlink()
    (here / "p.png").unlink()
    refuse(here, f"progressive {' '.join(map(str, line))}", "p-quality.csv exists, and is no such")


def test_progressive_with_the_score_of_an_extractor_with_classes(here: Path) -> None:
    """The paper's figure has the Inception Score, too; its spread are bars."""

    def classes(images: Tensor) -> Features:
        found = small()(images).features
        return Features(found, found[:, :5])

    with pytest.MonkeyPatch.context() as patch:
        extractor = replace(small(), has_classes=True, extract=classes)
        patch.setattr(quality, "make_extractor", lambda name, weights: extractor)
        line = (CKPT, "--num_steps", 2, "--num_images", 1, "--num_judged", 20, "--out", "p.png")
        result = run_here(here, "progressive", *line, "--accelerator", "cpu")
    assert result.status == 0, result.err
    head, *rows = (here / "p-quality.csv").read_text().splitlines()
    assert head == "t,fd_Small_20,is_Small_20,is_Small_std_20"
    assert len(rows) == 2
    with Image.open(here / "p-quality.png") as chart:
        assert chart.width > 1000


# --- shared-latents ------------------------------------------------------------------------------


def test_shared_latents(here: Path) -> None:
    picture = draw(here, "shared-latents", "--seeds", "3,8", "--batch_size", 2)
    assert picture.out == "run/pictures/shared-latents-step=10-ema.png"
    assert picture.record["split"] == [20, 15, 10, 5]
    assert picture.rows == ["seed 3", "seed 8"]
    own, *groups = picture.groups
    module = model(here)
    assert torch.equal(own.images[:, 0], module.sample([3, 8], batch_size=2))
    assert [list(group.columns) for group in groups] == [["x_t", "1", "2", "3"]] * 4
    steps = {step.t: step.x_prev for step in module.denoise([3, 8], DDPMSampler())}
    steps[T] = NoiseStreams([3, 8], torch.device("cpu")).normal((1, 8, 8))
    for group, num_noising_steps in zip(groups, (20, 15, 10, 5), strict=True):
        assert group.heading == f"shared: x_t of {num_noising_steps} noising steps"
        t, x_t = num_noising_steps - 1, steps[num_noising_steps]
        assert torch.equal(group.images[:, 0], to_uint8(x_t))
        # each sample is a chain of its own from there on, with noise of its own
        fresh = [derive_seed(8, t, 2)]
        *_, last = module.denoise(fresh, DDPMSampler(), Start(x_t[1:], t))
        assert_close(group.images[1, 3], finished_images(last)[0])
        samples = group.images[:, 1:].flatten(0, 1)
        assert len({sample.numpy().tobytes() for sample in samples}) == len(samples)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Images of chains in other batches: rounding may carry a pixel to the next level."""
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_split_at_the_top_gives_independent_samples(here: Path) -> None:
    """They share x_T, which is pure noise: Algorithm 2 with all later draws from other streams."""
    picture = draw(
        here,
        "shared-latents",
        "--num_images",
        1,
        "--split",
        T,
        "--num_samples",
        2,
        "--out",
        "x.png",
    )
    _, group = picture.groups
    module = model(here)
    x_T = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    streams = [torch.Generator().manual_seed(derive_seed(0, T - 1, n)) for n in (0, 1)]

    def draws() -> Iterator[Tensor]:
        yield torch.stack([x_T, x_T])
        while True:
            yield torch.stack([torch.randn(1, 8, 8, generator=stream) for stream in streams])

    with torch.no_grad():
        *_, last = DDPMSampler()(module, module.process, draws().__next__)
    assert torch.equal(group.images[0, 1:], to_uint8(last.x_prev))


def test_what_is_shared_late_leaves_little_open(here: Path) -> None:
    """Splits at nearest visited timesteps; a chain's samples depend on nobody else's."""
    options = ("--num_steps", 10, "--split", "20,12,1", "--num_samples", 4, "--weights", "raw")
    picture = draw(here, "shared-latents", "--seeds", "0-2", *options, "--out", "a.png")
    visited = DDPMSampler(10).respace(model(here).process).timesteps.tolist()
    assert picture.record["split"] == [20, 1 + min(visited, key=lambda t: abs(t - 11)), 1]
    spreads = [group.images[:, 1:].float().std(dim=1).mean() for group in picture.groups[1:]]
    assert spreads[0] > spreads[1] > spreads[2] == 0  # the last step draws nothing
    alone = draw(here, "shared-latents", "--seeds", "2", *options, "--out", "b.png")
    for group, other in zip(picture.groups, alone.groups, strict=True):
        assert_close(group.images[2:], other.images)


# --- interpolate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sampler", "weights"),
    [
        ("", DDPMSampler(), "ema"),
        (
            "--sampler ddim --weights raw --num_steps 10 --spacing leading --clip none",
            DDIMSampler(10, spacing="leading", clip="none"),
            "raw",
        ),
        ("--sampler ddim --eta 1 --seed 5", DDIMSampler(eta=1.0), "ema"),
    ],
)
def test_interpolate(here: Path, options: str, sampler: Sampler, weights: Weights) -> None:
    picture = draw(here, "interpolate", 2, 5, *options.split())
    assert picture.record["timesteps"] == [20, 17, 15, 12, 10, 7, 5, 2, 0]
    assert picture.rows == [f"{num} steps" for num in picture.record["timesteps"]]
    (group,) = picture.groups
    middle = [f"λ = 0.{tenth}" for tenth in range(1, 10)]
    assert group.columns == ["Source", "Rec.", *middle, "Rec.", "Source"]
    sources = held(here)["test"][[2, 5]]
    module, seed = model(here, weights), picture.record["seed"]
    noise = torch.stack(
        [
            torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(derive_seed(seed, number)))
            for number in (0, 1)
        ]
    )
    x_0 = to_float(sources)
    for num_noising_steps, cells in zip(picture.record["timesteps"], group.images, strict=True):
        assert torch.equal(cells[[0, -1]], sources)
        mixtures = cells[1:-1]
        if not num_noising_steps:
            shares = torch.arange(11).view(-1, 1, 1, 1) / 10
            assert torch.equal(mixtures, to_uint8((1 - shares) * x_0[:1] + shares * x_0[1:]))
            assert torch.equal(mixtures[[0, -1]], sources)
            continue
        if num_noising_steps in (7, 20):
            t = num_noising_steps - 1
            x_t = module.process.q_sample(x_0, torch.tensor([t, t]), noise)
            # the ends are reconstructions of each image alone
            starts = torch.stack([x_t[0], x_t.mean(dim=0), x_t[1]])
            own = [derive_seed(seed, 2, tenth) for tenth in (0, 5, 10)]
            *_, last = module.denoise(own, sampler, Start(starts, t))
            assert_close(mixtures[[0, 5, 10]], finished_images(last))


def test_interpolate_takes_files(here: Path) -> None:
    images = held(here)
    for index in (0, 1):
        Image.fromarray(images["train"][index, 0].numpy()).save(here / f"{index}.png")
    options = ("--timesteps", "10,0,1", "--out")
    files = draw(here, "interpolate", "0.png", "./1.png", *options, "files.png")
    assert files.rows == ["10 steps", "0 steps", "1 steps"]
    numbers = draw(here, "interpolate", "0", "1", "--split", "train", *options, "numbers.png")
    mixed = draw(here, "interpolate", "0", "./1.png", "--split", "train", *options, "mixed.png")
    for other in (numbers, mixed):
        assert torch.equal(files.groups[0].images, other.groups[0].images)
        assert files.record["images_sha256"] == other.record["images_sha256"]
    # any picture is brought to the model's shape
    colours = np.zeros((16, 24, 3), dtype=np.uint8)
    colours[:, 4:20] = 255
    Image.fromarray(colours).save(here / "wide.jpg")
    wide = draw(here, "interpolate", "wide.jpg", 6, "--split", "val", *options, "wide.png")
    assert wide.groups[0].images[0, 0].float().mean() > 240
    assert torch.equal(wide.groups[0].images[0, -1], images["val"][6])


# --- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "crop"), [("ddim", 5), *((name, None) for name in get_args(SamplerName))]
)
def test_neighbours(here: Path, name: SamplerName, crop: int | None) -> None:
    cropped = () if crop is None else ("--crop", crop)
    options = ("--seeds", "4-6", "--batch_size", 3, "--num_neighbours", 2, *cropped, *SMALL)
    sampled = ("--sampler", name, "--num_steps", 8, "--spacing", "even", "--clip", "none")
    picture = draw(here, "neighbours", *options, *sampled)
    assert picture.rows == ["seed 4", "seed 5", "seed 6"]
    sampler = make_sampler(name, 8, spacing="even", clip="none")
    samples = model(here).sample([4, 5, 6], sampler)
    images = held(here)["train"]
    seen = [samples, images] if crop is None else [centre_crop(x, crop) for x in (samples, images)]
    spaces = {
        "pixels": [x.flatten(1).double() / seen[0][0].numel() ** 0.5 for x in seen],
        SMALL[1]: [small()(x).features.double() for x in seen],
    }
    assert picture.record["crop"] == crop
    assert picture.record["reference"]["num_images"] == NUM_TRAIN
    for group, (space, (ours, theirs)) in zip(picture.groups, spaces.items(), strict=True):
        assert group.heading == f"nearest by {space}"
        assert group.columns == ["sample", "1", "2"]
        expected = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist").sort()
        found = picture.record["neighbours"][space]
        assert found["indices"] == expected.indices[:, :2].tolist()
        distances = torch.tensor(found["distances"], dtype=torch.float64)
        torch.testing.assert_close(distances, expected.values[:, :2], rtol=1e-5, atol=1e-5)
        assert torch.equal(group.images[:, 0], samples)
        assert torch.equal(group.images[:, 1:], images[expected.indices[:, :2]])
        assert group.labels[0] == ["", *(f"{distance:.3g}" for distance in found["distances"][0])]


@pytest.mark.parametrize("crop", [None, 4])
def test_training_images_are_their_own_neighbours(here: Path, crop: int | None) -> None:
    data = RunConfig.of(Run(here / "run")).training_data()
    images = held(here)["train"]
    everything = np.arange(NUM_TRAIN)
    found = neighbours.find_neighbours(images, data.train_images, everything, small(), 1, crop, 7)
    for space, nearest in found.items():
        assert torch.equal(nearest.indices[:, 0], torch.arange(NUM_TRAIN)), space
        assert nearest.distances.max() <= (0 if space == "pixels" else 1e-4), space


def test_neighbours_in_other_images_by_the_default_extractor(here: Path, pictures: Path) -> None:
    options = ("--reference", pictures / "val", "--num_train", 5)
    picture = draw(here, "neighbours", "--num_images", 2, *options)
    assert picture.record["extractor"].startswith("efficientnet-lite0")
    assert picture.record["reference"]["num_images"] == NUM_VAL
    assert picture.record["num_train"] == 5
    assert [group.heading for group in picture.groups] == [
        "nearest by pixels",
        "nearest by efficientnet-lite0",
    ]
    val = held(here)["val"]
    for found, group in zip(picture.record["neighbours"].values(), picture.groups, strict=True):
        searched = np.linspace(0, NUM_VAL - 1, 5).astype(int).tolist()
        assert set(np.unique(found["indices"])) <= set(searched)
        assert torch.equal(group.images[:, 1:], val[torch.tensor(found["indices"])])


# --- files and refusals --------------------------------------------------------------------------


def test_only_the_same_picture_is_written_over(here: Path) -> None:
    options = ("--num_images", 1, "--num_steps", 2, "--out", "out/p.png")
    first = draw(here, "progressive", *options)
    (here / "out/p.png").write_bytes(b"cut off")
    assert torch.equal(draw(here, "progressive", *options).groups[0].images, first.groups[0].images)
    shutil.copy(here / CKPT, here / "copy.ckpt")
    again = run_here(here, "progressive", "copy.ckpt", *options, "--accelerator", "cpu")
    assert again.status == 0, again.err
    line = f"{CKPT} --num_images 1 --num_steps 2 --out out/p.png"
    refuse(here, f"progressive {line} --weights raw", "there is one with weights ema, not raw")
    refuse(here, f"progressive {line} --seeds 1", "with seeds 0, not 1; choose another")
    refuse(here, f"shared-latents {line}", "with command progressive, not shared-latents")
    (here / "out/p.json").write_text("{")
    refuse(here, f"progressive {line}", "out/p.json: cannot be read")
    (here / "out/p.json").unlink()
    refuse(here, f"progressive {line}", "--out out/p.png: exists, and is no such picture")


def test_a_checkpoint_outside_of_a_run(here: Path) -> None:
    shutil.copy(here / CKPT, here / "copy.ckpt")
    result = run_here(here, "progressive", "copy.ckpt", "--num_steps", 1, "--accelerator", "cpu")
    assert result.out == (
        "picture: pictures/progressive-step=10-ema.png\n"
        "record: pictures/progressive-step=10-ema.json\n"
    )
    refuse(here, "interpolate copy.ckpt 1 2", "lies in no run's folder; give image files instead")
    refuse(
        here, "neighbours copy.ckpt", "lies in no run's folder; say what to compare with by --re"
    )


def test_refusals(here: Path) -> None:
    (here / "text.png").write_text("no image")
    (here / "folder.png").mkdir()
    Image.new("L", (8, 8)).save(here / "a.png")
    for command in ("progressive", "shared-latents", "neighbours", "interpolate"):
        two = " a.png a.png" if command == "interpolate" else ""
        line = f"{command} {CKPT}{two}"
        refuse(here, f"{line} --num_steps 21", "num_steps must lie in 1..20, got 21")
        refuse(here, f"{line} --out text.png", "--out text.png: exists, and is no such picture")
        if command != "interpolate":
            refuse(here, f"{line} --batch_size 0", "--batch_size must be at least 1, got 0")
            refuse(here, f"{line} --seeds 3-1", "--seeds 3-1")
    refuse(here, "progressive missing.ckpt", "missing.ckpt: no such checkpoint file")
    for options, told in (
        ("--out p.jpg", "--out p.jpg: give a file's name that ends in .png"),
        ("--out folder.png", "--out folder.png: a folder"),
        ("--accelerator magic", "--accelerator"),
        ("--weights emma", "expected one of 'ema', 'raw', got emma"),
        ("--num_stps 3", "did you mean --num_steps?"),
        ("--num_images 0", "--num_images must be at least 1"),
        ("--spacing evn", "did you mean even?"),
        ("--clip statc", "got statc"),
    ):
        refuse(here, f"progressive {CKPT} {options}", told)
    for options, told in (
        ("--num_columns 0", "--num_columns 0: must lie in 1..20, the steps"),
        ("--num_columns 6 --num_steps 5", "--num_columns 6: must lie in 1..5, the steps"),
        ("--eta 0.5", "eta belongs to the ddim sampler"),
    ):
        refuse(here, f"progressive {CKPT} {options}", told)
    for options, told in (
        ("--split 21", "--split 21: must lie in 1..20, the schedule"),
        ("--split 0", "--split 0: say something like"),
        ("--split 10,10", "--split 10,10: names a number twice"),
        ("--split 20,19 --num_steps 3", "--split 20,19: two of them are nearest to one of the 3"),
        ("--num_samples 0", "--num_samples must be at least 1, got 0"),
    ):
        refuse(here, f"shared-latents {CKPT} {options}", told)
    for options, told in (
        ("a.png", "arguments are required: image_b"),
        ("a.png b.png", "b.png: no such image file"),
        ("a.png text.png", "text.png: cannot be decoded: not an image"),
        ("0 7", "image 7: the run has 7 test images, from 0 to 6"),
        ("a.png a.png --split vall", "expected one of 'train', 'val', 'test', got vall"),
        ("a.png a.png --timesteps 21", "--timesteps 21: must lie in 0..20, the schedule"),
        ("a.png a.png --timesteps 1,x", "--timesteps 1,x: say something like"),
        ("a.png a.png --seed=-1", "--seed -1: must lie in 0.."),
    ):
        refuse(here, f"interpolate {CKPT} {options}", told)
    for options, told in (
        ("--crop 9", "--crop 9: must lie in 1..8, the images' size"),
        ("--crop 0", "--crop 0: must lie in 1..8"),
        ("--num_neighbours 31", "--num_neighbours 31: must lie in 1..30, the images of"),
        ("--num_neighbours 0", "--num_neighbours 0"),
        ("--num_neighbours 3 --num_train 2", "--num_neighbours 3: must lie in 1..2, the images of"),
        ("--num_train 0", "--num_train must be at least 1, got 0"),
        ("--reference nowhere/x", "--reference nowhere/x: "),
        ("--extractor inceptio", "no extractor inceptio"),
    ):
        refuse(here, f"neighbours {CKPT} {' '.join(SMALL)} {options}", told)
    assert not (here / "run/pictures").exists()
    assert set(tree(here)) >= {"a.png", "text.png"}
