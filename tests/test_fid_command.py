"""fid: rows, records and curves; what is judged again and what not; what is refused."""

import csv
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm_lightning import DDPM
from ddpm_lightning.checkpoints import Weights, file_sha256
from ddpm_lightning.commands import judging, watching
from ddpm_lightning.commands.fid import make_samplers
from ddpm_lightning.commands.rows import SampledRow, StoredRow
from ddpm_lightning.commands.subjects import CheckpointReader, StoredImages, find_subjects
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_png
from ddpm_lightning.metrics import selftest
from ddpm_lightning.metrics.frechet import frechet_distance
from ddpm_lightning.metrics.judge import Collector
from ddpm_lightning.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    HeunSampler,
    Sampler,
)
from tests.command_line import TINY, Result, ended, run_here, run_process, start_process, tree
from tests.extractors import Small, small
from tests.malicious import Malicious
from tests.test_bad_input import assert_refused
from tests.training import save, scalars

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::tqdm.TqdmWarning"),
]

ROOT = Path(__file__).parent.parent
EXTRACTOR = f"{Small.__module__}.{Small.__name__}"
FD = "fd_Small"
N = 30
SEED = 3  # of the run; it decides which images are left out for validation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits with step=5.ckpt and step=10.ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY.format(source="digits"))
    result = run_here(folder, "fit", "--config", "tiny.yaml", "--seed_everything", SEED)
    assert result.status == 0, result.err
    return folder / "runs/tiny/1"


@pytest.fixture
def here(tmp_path: Path, trained: Path) -> Path:
    """A folder with a copy of the run in it."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder / "run")
    return folder


def options(*arguments: object) -> tuple[object, ...]:
    return ("fid", *arguments, "--extractor", EXTRACTOR, "--accelerator", "cpu")


def fid(cwd: Path, *arguments: object, num_images: int = N) -> Result:
    result = run_here(cwd, *options(*arguments, "--num_images", num_images))
    assert result.status == 0, result.err
    return result


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def values(folder: Path) -> list[float]:
    return [row["metrics"][FD] for row in read(folder / "sweep.json")["rows"]]


def samples(path: Path, weights: Weights, sampler: Sampler, num_images: int = N) -> Tensor:
    return DDPM.from_checkpoint(path, weights).sample(range(num_images), sampler)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The distance between two sets of images, by the library."""
    moments = []
    for images in (ours, theirs):
        collector = Collector(small(), ["fd"])
        collector.add(images)
        moments.append(collector.finish().moments)
    return frechet_distance(*moments)


def digits() -> Tensor:
    """The images that the run trains on."""
    images = ImageDataModule("digits", seed=SEED).train_images
    return torch.from_numpy(images[np.arange(len(images))])


# --- sweeps --------------------------------------------------------------------------------------


def test_sweep(here: Path) -> None:
    events = {path.name: path.read_bytes() for path in (here / "run").glob("events*")}
    result = fid(here, "run", "--weights", "ema,raw", "--num_steps", "4,8")
    out = here / "run/fid_sweep"
    rows = read(out / "sweep.json")["rows"]
    expected = [
        (step, weights, steps) for step in (5, 10) for weights in ("ema", "raw") for steps in (4, 8)
    ]
    real = digits()
    assert len(rows) == len(expected)
    for row, (step, weights, steps) in zip(rows, expected, strict=True):
        path = here / f"run/checkpoints/step={step}.ckpt"
        sampled = samples(path, weights, DDIMSampler(steps))  # type: ignore[arg-type]
        assert row["metrics"] == {FD: pytest.approx(distance(sampled, real), rel=1e-9)}
        assert row["subject"] == {
            "path": f"run/checkpoints/step={step}.ckpt",
            "sha256": file_sha256(path),
            "run": "run",
            "step": step,
            "images_seen": 4 * step,
            "weights": weights,
            "ema_decay": 0.995 if weights == "ema" else None,
            "sampler": {
                "name": "ddim",
                "num_steps": steps,
                "spacing": "even",
                "clip": "static",
                "eta": 0.0,
            },
            "nfe": steps,
            "variance": "fixed_large",
            "guidance": "none",
            "dtype": "float32",
            "seeds": f"0-{N - 1}",
            "batch_size": 64,
            "world_size": 1,
        }
        assert row["num_images"] == row["protocol"]["num_images"] == N
        assert row["protocol"]["reference"]["num_images"] == len(real) == 1707
        assert row["environment"]["command"]
        assert not row["warnings"]
    assert len(list((out / "records").iterdir())) == 8
    assert not (out / "record.json").exists()

    # a line for each as it comes, then all of them
    assert result.out.count(f"step=5-ema-ddim-4: {FD}_30 {rows[0]['metrics'][FD]:.5g}\n") == 1
    table = result.out.splitlines()[8:17]
    assert table[0].split() == ["subject", "weights", "sampler", "steps", f"{FD}_30"]
    for line, (step, weights, steps) in zip(table[1:], expected, strict=True):
        assert line.split()[:4] == [f"step={step}", weights, "ddim", str(steps)]
    assert result.out.endswith("records and curves: run/fid_sweep\n")
    assert "judging step=10-raw-ddim-8 (8 of 8)" in result.err
    assert f"{N} of {N} images" in result.err

    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    for cells, row in zip(lines, rows, strict=True):
        assert float(cells[f"{FD}_30"]) == row["metrics"][FD]
        assert cells["step"] == str(row["subject"]["step"])
        assert cells["num_steps"] == str(row["subject"]["nfe"])
    with Image.open(out / "sweep.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("L").tobytes())) > 10

    # curves beside the run's own events, which are as they were
    curve = scalars(out / "curves", f"fid_sweep/{FD}_30/raw-ddim-8")
    assert curve == pytest.approx({5: rows[3]["metrics"][FD], 10: rows[7]["metrics"][FD]})
    assert {path.name: path.read_bytes() for path in (here / "run").glob("events*")} == events


def test_a_single_row(here: Path) -> None:
    checkpoint = "run/checkpoints/step=10.ckpt"
    fid(here, checkpoint, "--sampler", "ddpm", "--out", "out")
    record = read(here / "out/record.json")
    sampled = samples(here / checkpoint, "ema", DDPMSampler())
    assert record["metrics"][FD] == pytest.approx(distance(sampled, digits()), rel=1e-9)
    assert record["subject"]["nfe"] == 20
    assert [record] == read(here / "out/sweep.json")["rows"]
    assert record == read(next((here / "out/records").iterdir()))

    # eta is ddim's alone
    fid(here, checkpoint, "--sampler", "ddpm,ddim", "--num_steps", 4, "--eta", 0.5, "--out", "eta")
    first, second = read(here / "eta/sweep.json")["rows"]
    assert "eta" not in first["subject"]["sampler"]
    assert second["subject"]["sampler"]["eta"] == 0.5
    assert not (here / "eta/record.json").exists()


def test_samplers_and_their_options(here: Path) -> None:
    """Each row has its own steps, evaluations and name; the chart is over evaluations."""
    checkpoint = "run/checkpoints/step=10.ckpt"
    arguments = ("--sampler", "dpmpp_2m,dpmpp_2m_sde,heun", "--num_steps", 4, "--out", "out")
    result = fid(here, checkpoint, *arguments, "--spacing", "leading", "--clip", "dynamic")
    rows = read(here / "out/sweep.json")["rows"]
    samplers = [
        DPMSolver2MSampler(4, spacing="leading", clip="dynamic"),
        DPMSolver2MSDESampler(4, spacing="leading", clip="dynamic"),
        HeunSampler(4, spacing="leading", clip="dynamic"),
    ]
    for row, sampler in zip(rows, samplers, strict=True):
        images = samples(here / checkpoint, "ema", sampler)
        assert row["metrics"][FD] == pytest.approx(distance(images, digits()), rel=1e-9)
        assert row["subject"]["sampler"] == {
            "name": sampler.name,
            "num_steps": 4,
            "spacing": "leading",
            "clip": "dynamic",
        }
    assert [row["subject"]["nfe"] for row in rows] == [4, 4, 7]
    assert f"step=10-ema-heun-4-leading-clipdynamic: {FD}_30 " in result.out
    assert "heun leading clip dynamic          4 " in result.out
    with (here / "out/sweep.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [(row["num_steps"], row["nfe"]) for row in cells] == [("4", "4"), ("4", "4"), ("4", "7")]
    assert {(row["spacing"], row["clip"], row["eta"]) for row in cells} == {
        ("leading", "dynamic", "")
    }


def test_a_sampler_may_bring_its_own_steps() -> None:
    chosen = make_samplers("ddim,heun:5:10,ddpm:250", "20,50", 0.5, None, None)
    assert chosen == [
        DDIMSampler(20, 0.5),
        DDIMSampler(50, 0.5),
        HeunSampler(5),
        HeunSampler(10),
        DDPMSampler(250),
    ]
    assert make_samplers("ddpm:7,ddim", None, None, None, None) == [DDPMSampler(7), DDIMSampler()]
    for names, message in (
        ("ddim,heun:5:x", "--sampler heun: 5,x: say something like 50"),
        ("heun:", "--sampler heun: : say something like 50"),
        ("heun:5:5", "names a number twice"),
        ("heun:5,heun:10", "--sampler heun,heun: names one of them twice"),
        ("hein:5", "'hein' is none of .*; did you mean heun"),
    ):
        with pytest.raises(InputError, match=message):
            make_samplers(names, None, None, None, None)


def test_what_is_judged_is_not_judged_again(here: Path) -> None:
    fid(here, "run/checkpoints/step=5.ckpt", "--num_steps", 4)
    before = tree(here / "run/fid_sweep/records")
    again = fid(here, "run/checkpoints/step=5.ckpt", "--num_steps", 4)
    assert "step=5-ema-ddim-4:" not in again.out
    assert "step=5   ema      ddim     4" in again.out
    assert tree(here / "run/fid_sweep/records") == before

    # more rows of the same protocol; named in another way, it is the same checkpoint
    shutil.copytree(here / "run", here / "moved")
    fid(here, "moved", "--num_steps", "4,8", "--out", "run/fid_sweep")
    after = tree(here / "run/fid_sweep/records")
    assert len(after) == 4
    assert after.items() >= before.items()

    # another protocol is another sweep
    before = tree(here)
    for more, key in (
        (("--num_images", 31), "num_images: 30, 31"),
        (("--num_images", N, "--reference", "digits"), "reference.num_images: 1707, 1797"),
        (("--num_images", N, "--metrics", "kid"), "metrics: ['fd'], ['kid']"),
        (("--num_images", N, "--num_repeats", 2), "num_repeats: 1, 2"),
    ):
        result = run_here(here, *options("run", *more))
        assert_refused(result, "--out run/fid_sweep: holds another sweep", key)
    assert tree(here) == before


def test_a_killed_sweep_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = options("run", "--weights", "ema,raw", "--num_steps", "10,20")
    arguments += ("--num_images", 100, "--batch_size", 10, "--out")
    records = here / "killed/records"
    with ended(start_process(here, *arguments, "killed")):
        deadline = time.monotonic() + 120
        while not list(records.glob("step*")) and time.monotonic() < deadline:
            time.sleep(0.01)
    done = {name: entry for name, entry in tree(records).items() if ".part" not in name}
    assert 0 < len(done) < 8
    result = run_here(here, *arguments, "killed")
    assert result.status == 0, result.err
    num_judged = sum(": fd_Small_100 " in line for line in result.out.splitlines())
    assert num_judged == 8 - len(done)
    assert tree(records).items() >= done.items()
    run_here(here, *arguments, "whole")
    killed, whole = (read(here / name / "sweep.json")["rows"] for name in ("killed", "whole"))
    for ours, theirs in zip(killed, whole, strict=True):
        for key in ("metrics", "protocol", "subject", "repeats"):
            assert ours[key] == theirs[key]


# --- numbers -------------------------------------------------------------------------------------


def test_all_metrics_and_repeats(here: Path) -> None:
    arguments = ("run/checkpoints/step=10.ckpt", "--num_steps", 4, "--metrics", "fd,kid,prc")
    result = fid(here, *arguments, "--num_repeats", 3, "--out", "three")
    record = read(here / "three/record.json")
    repeats = record["repeats"]
    assert repeats["count"] == 3
    assert record["subject"]["seeds"] == "0-89"
    assert record["num_images"] == N
    assert [each["numbers"] for each in repeats["each"]] == ["0-29", "30-59", "60-89"]
    names = [FD, "kd_Small", "kd_Small_std", "precision_Small", "recall_Small"]
    assert list(record["metrics"]) == names
    for name in names:
        each = [repeat["metrics"][name] for repeat in repeats["each"]]
        assert record["metrics"][name] == pytest.approx(np.mean(each))
        assert repeats["std"][name] == pytest.approx(np.std(each, ddof=1))
    assert repeats["best_of_k"][FD] == min(repeat["metrics"][FD] for repeat in repeats["each"])
    assert len({repeat["metrics"][FD] for repeat in repeats["each"]}) == 3

    # the best is never taken for the value
    assert f"{repeats['best_of_k'][FD]:.5g}" not in result.out
    assert f"{FD}_30 {record['metrics'][FD]:.5g} ± {repeats['std'][FD]:.2g}, " in result.out
    assert "mean ± standard deviation of 3 repeats" in result.out
    header = (here / "three/sweep.csv").read_text().splitlines()[0].split(",")
    assert {f"{FD}_30", f"{FD}_30 standard deviation of 3", f"{FD}_30 best of 3"} <= set(header)

    fid(here, *arguments, "--out", "one")
    one = read(here / "one/record.json")
    assert one["metrics"] == repeats["each"][0]["metrics"]
    assert one["repeats"]["std"][FD] is None
    assert one["repeats"]["best_of_k"] == {}
    assert "best" not in (here / "one/sweep.csv").read_text()


def test_images_on_the_disk_equal_those_of_a_checkpoint(here: Path) -> None:
    checkpoint = "run/checkpoints/step=10.ckpt"
    sampling = ("--sampler", "ddim", "--num_steps", 4)
    for name, more in (("png", ("--gif",)), ("npz", ("--format", "npz"))):
        arguments = (checkpoint, *sampling, "--num_images", N, "--out", name, *more)
        assert run_here(here, "sample", *arguments, "--accelerator", "cpu").status == 0
    with np.load(here / "npz/samples.npz") as arrays:
        array = arrays["arr_0"]
    np.savez(here / "channels_first.npz", images=array.transpose(0, 3, 1, 2))
    (here / "plain").mkdir()
    for index, image in enumerate(array):
        write_png(here / f"plain/{index:02}.png", torch.from_numpy(image).permute(2, 0, 1))

    subjects = (checkpoint, "png", "npz/samples.npz", "channels_first.npz", "plain")
    arguments = (*subjects, *sampling, "--reference", "digits", "--out", "out")
    result = fid(here, *arguments)
    first, *others = values(here / "out")
    assert others == [pytest.approx(first, rel=1e-12)] * 4
    rows = read(here / "out/sweep.json")["rows"]
    assert rows[1]["subject"]["sample_settings"]["checkpoint"] == checkpoint
    assert rows[2]["subject"]["sha256"] == file_sha256(here / "npz/samples.npz")
    assert rows[4]["subject"]["images"] == "0-29"
    told = [row["subject"].get("quantisation") for row in rows]
    assert told == [None, None, *["uint8 as stored; how it was rounded is not known"] * 3]
    assert {row["protocol"]["reference"]["num_images"] for row in rows} == {1797}
    assert "npz/samples.npz" in result.out

    # as many as there are, unless told
    assert run_here(here, *options("png", "--reference", "digits")).status == 0
    assert read(here / "fid_sweep/record.json")["num_images"] == N
    arguments = ("plain", "--reference", "digits", "--out", "halves", "--num_repeats", 2)
    assert run_here(here, *options(*arguments)).status == 0
    halves = read(here / "halves/record.json")
    assert halves["num_images"] == 15
    assert [each["numbers"] for each in halves["repeats"]["each"]] == ["0-14", "15-29"]
    assert len(halves["warnings"]) == 1


def test_any_batch_size_and_number_of_processes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "--num_steps", 4, "--metrics", "fd,kid", "--num_repeats", 2)
    for name, batch_size in (("64", 64), ("7", 7)):
        fid(here, *arguments, "--batch_size", batch_size, "--out", name, num_images=31)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(here.parent / "here-cache"))
    parallel = (*arguments, "--num_images", 31, "--devices", 2, "--batch_size", 8, "--out", "two")
    result = run_process(here, *options(*parallel))
    assert result.status == 0, result.err
    assert result.out.count("records and curves: two") == 1
    rows = {name: read(here / name / "sweep.json")["rows"] for name in ("64", "7", "two")}
    assert len(rows["two"]) == 2
    for one, seven, two in zip(*rows.values(), strict=True):
        for metric, value in one["metrics"].items():
            assert seven["metrics"][metric] == pytest.approx(value, rel=1e-6)
            assert two["metrics"][metric] == pytest.approx(value, rel=1e-6)
        assert two["subject"]["world_size"] == 2
        assert two["protocol"] == one["protocol"]


# --- references ----------------------------------------------------------------------------------


def test_references(here: Path, trained: Path) -> None:
    arguments = ("run/checkpoints/step=10.ckpt", "--num_steps", 4, "--out")
    fid(here, *arguments, "default")
    default = read(here / "default/record.json")
    assert default["protocol"]["reference"]["name"] == "digits"
    config = (here / "run/config.yaml").read_text()
    assert "val_fraction: 0.05" in config

    # what the checkpoint says of its images must be so
    (here / "run/config.yaml").write_text(config.replace("everything: 3", "everything: 0"))
    result = run_here(here, *options(*arguments, "other", "--num_images", N))
    assert_refused(result, "step=10.ckpt: the source of its training images gives others by now")
    shutil.copytree(here / "run", here / "other")
    (here / "run/config.yaml").write_text(config)
    result = run_here(here, *options("run", "other", "--num_images", N))
    assert_refused(result, "run and other trained on different images; say what to compare with")
    (here / "run/config.step=5.yaml").write_text(config.replace("fraction: 0.05", "fraction: 0.1"))
    result = run_here(here, *options(*arguments, "other", "--num_images", N))
    assert_refused(result, "the run went on with other images (run/config.yaml and run/config.st")
    (here / "run/config.step=5.yaml").unlink()

    # saved statistics give what their images gave
    [file] = (here.parent / "here-cache").glob("reference-*.npz")
    fid(here, *arguments, "saved", "--reference", file)
    saved = read(here / "saved/record.json")
    assert saved["metrics"] == default["metrics"]
    assert saved["reference_file"] == {"path": str(file), "sha256": file_sha256(file)}
    assert saved["protocol"]["reference"].pop("name")
    assert default["protocol"]["reference"].pop("name")
    assert saved["protocol"] == default["protocol"]

    # a data set is brought to the subjects' size and channels
    (here / "large").mkdir()
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / f"large/{index}.png")
    fid(here, *arguments, "large_out", "--reference", "large")
    contents = read(here / "large_out/record.json")["protocol"]["reference"]
    assert (contents["image_shape"], contents["num_images"]) == ([1, 8, 8], 5)


def test_compare(here: Path) -> None:
    checkpoint = "run/checkpoints/step=10.ckpt"
    fid(here, checkpoint, "--num_steps", 4, "--out", "a")
    fid(here, checkpoint, "--num_steps", 8, "--out", "b")
    fid(here, checkpoint, "--num_steps", 4, "--out", "c", num_images=31)
    a, b, c = (f"{name}/record.json" for name in "abc")
    before = tree(here)
    same = run_here(here, "fid", "--compare", a, b)
    assert same.status == 0
    first, second, last = same.out.splitlines()
    value = read(here / a)["metrics"][FD]
    assert first == f"{a}: {FD} {value:.6g} (30 images)"
    assert second.startswith(f"{b}: {FD} ")
    assert last == "can be compared: the protocols are equal"

    other = run_here(here, "fid", "--compare", a, c)
    assert other.status == 1
    assert other.out.splitlines()[2:] == [
        "cannot be compared; the protocols differ (first, second):",
        "  num_images: 30, 31",
    ]
    assert_refused(run_here(here, "fid", "--compare", a, "nowhere.json"), "nowhere.json: no record")
    assert_refused(run_here(here, "fid", "--compare", a), "--compare: expected 2 arguments")
    assert tree(here) == before


def test_selftest(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "run", lambda say: say("found") or 3)
    result = run_here(here, "fid", "--selftest")
    assert (result.status, result.out) == (3, "found\n")


# --- while training ------------------------------------------------------------------------------


def move_in(source: Path, run: Path) -> None:
    """Give a run a checkpoint, as training does: whole at once."""
    part = run / ".part"
    shutil.copy(source, part)
    (run / "checkpoints").mkdir(exist_ok=True)
    part.rename(run / "checkpoints" / source.name)


def test_watch(here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (judging, watching):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    (here / "live").mkdir()
    shutil.copy(trained / "config.yaml", here / "live")
    seen: list[tuple[int, bool]] = []

    def num_rows() -> int:
        sweep = here / "live/fid_sweep/sweep.json"
        return len(read(sweep)["rows"]) if sweep.exists() else 0

    def train_slowly() -> None:
        time.sleep(0.3)
        move_in(trained / "checkpoints/step=5.ckpt", here / "live")
        end = time.monotonic() + 60
        while num_rows() < 2 and time.monotonic() < end:
            time.sleep(0.05)
        seen.append((num_rows(), (here / "live/fid_sweep/sweep.png").exists()))
        # whatever was seen: without the last checkpoint the command would wait on
        move_in(trained / "checkpoints/step=10.ckpt", here / "live")

    thread = threading.Thread(target=train_slowly)
    thread.start()
    arguments = ("--num_steps", 4, "--weights", "ema,raw")
    result = fid(here, "live", "--watch", *arguments)
    thread.join()
    assert seen == [(2, True)]
    assert result.out.startswith("waiting for the first checkpoint of live\nstep=5-ema-ddim-4: ")
    fid(here, "run", *arguments)
    assert values(here / "live/fid_sweep") == values(here / "run/fid_sweep")
    assert len(scalars(here / "live/fid_sweep/curves", f"fid_sweep/{FD}_30/ema-ddim-4")) == 2

    # all is there: nothing is waited for
    assert "step=10  ema" in fid(here, "live", "--watch", *arguments).out


def test_ctrl_c(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "run/checkpoints/step=10.ckpt").unlink()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = options("run", "--watch", "--num_steps", 4, "--num_images", N)
    with ended(start_process(here, *arguments)) as process:
        deadline = time.monotonic() + 120
        while not (here / "run/fid_sweep/sweep.png").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out.endswith("records and curves: run/fid_sweep\n")
    assert len(values(here / "run/fid_sweep")) == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A folder with all kinds of subjects and references, which no refused command may change."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(trained, folder / "run")
    checkpoints = folder / "run/checkpoints"
    shutil.copy(checkpoints / "step=10.ckpt", folder / "alone.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "alone.ckpt").read_bytes()[:999])
    content = torch.load(folder / "alone.ckpt", weights_only=True)
    weights = content["ema_state_dict"]
    content["ema_state_dict"] = {name: value * torch.nan for name, value in weights.items()}
    save(content, checkpoints / "diverged.ckpt")
    del content["ema_state_dict"]
    save(content, folder / "raw.ckpt")

    sizes = {"good": (8, 8), "large": (16, 16), "colour": (8, 8)}
    generator = np.random.default_rng(0)
    for name, size in sizes.items():
        (folder / name).mkdir()
        for index in range(40):
            shape = (*size, 3) if name == "colour" else size
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    for name in ("broken", "mixed", "single"):
        (folder / name).mkdir()
        shutil.copy(folder / "good/00.png", folder / name)
    (folder / "broken/01.png").write_bytes(b"no image")
    shutil.copy(folder / "large/01.png", folder / "mixed")
    for name in ("empty", "full", "no_steps/checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "full/x").touch()

    np.savez(folder / "float.npz", np.zeros((40, 8, 8, 1)))
    np.savez(folder / "flat.npz", np.zeros((40, 64), np.uint8))
    np.savez(folder / "channels.npz", np.zeros((40, 8, 8, 4), np.uint8))
    np.savez(folder / "nothing.npz")
    planted = np.array([Malicious(folder / "victim")], dtype=object)
    np.savez(folder / "pickled.npz", planted)
    (folder / "text.npz").write_text("hello")
    (folder / "cut.npz").write_bytes((folder / "flat.npz").read_bytes()[:300])

    result = run_here(folder, *options("run", "--num_images", N, "--num_steps", 4, "--out", "done"))
    assert result.status == 0, result.err
    [file] = cache(folder).glob("reference-*.npz")
    shutil.copy(file, folder / "statistics.npz")
    arrays = dict(np.load(file))
    np.savez(folder / "cut_statistics.npz", **{**arrays, "mean": arrays["mean"][:-1]})
    protocol = json.loads(str(arrays["protocol"]))
    for name, changes in (
        ("sized", {"reference": {**protocol["reference"], "image_shape": [1, 16, 16]}}),
        ("extractor", {"weights_sha256": "0"}),
        ("nameless", {"reference": {}}),
    ):
        text = json.dumps({**protocol, **changes})
        np.savez(folder / f"{name}.npz", **{**arrays, "protocol": np.array(text)})
    return folder


def cache(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-cache"


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for locks."""
    return {
        name: content for name, (_, content) in tree(folder).items() if not name.endswith(".lock")
    }


GOOD = "good --reference digits"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "give a SUBJECT"),
        ("nowhere", "nowhere: no such file or folder; a subject is a checkpoint"),
        ("nowhere.npz", "nowhere.npz: no such file or folder"),
        ("cut.ckpt", "cut.ckpt: not a whole checkpoint file"),
        ("raw.ckpt", "raw.ckpt: the run kept no EMA weights; ask for the raw ones"),
        ("run raw.ckpt --weights raw,ema", "raw.ckpt: the run kept no EMA weights"),
        ("no_steps", "no_steps: the run has no checkpoints/step=N.ckpt"),
        ("empty", "empty: neither a run's folder (it has no checkpoints/) nor one of images"),
        ("broken", "broken/01.png cannot be decoded: not an image"),
        ("mixed", "mixed/01.png is 16 x 16 (height x width) but mixed/00.png is 8 x 8"),
        ("single --reference digits", "single: holds 1 image, too few"),
        ("good large", "large: its images are 1x16x16 (channels x height x width), but those of"),
        ("good colour", "colour: its images are 3x8x8"),
        ("float.npz", "float.npz: holds float64 [40, 8, 8, 1]; images are uint8 [N, H, W, C]"),
        ("flat.npz", "flat.npz: holds uint8 [40, 64]; images are uint8"),
        ("channels.npz", "channels.npz: holds uint8 [40, 8, 8, 4]; images have 1 or 3 channels"),
        ("nothing.npz", "nothing.npz: not an .npz file of images"),
        ("text.npz", "text.npz: not an .npz file of images"),
        ("pickled.npz", "pickled.npz: not an .npz file of images"),
        ("cut.npz", "cut.npz: not an .npz file of images"),
        ("statistics.npz", "statistics.npz: statistics, not images; give it as --reference"),
        (f"{GOOD} --num_images 41", "good: holds 40 images, too few for --num_images 41"),
        (f"{GOOD} --num_images 21 --num_repeats 2", "40 images, too few for --num_images 21 x --n"),
        ("alone.ckpt good --reference digits", "good: holds 40 images, too few for --num_images 5"),
        ("run --num_images 1", "--num_images 1: a distance needs at least two images"),
        ("run --num_images 0", "--num_images 0: a distance needs at least two images"),
        ("run --num_images 5000000000", "--num_images 5000000000: there are 4294967296 seeds"),
        ("run --num_repeats 0", "--num_repeats and --batch_size must be at least 1"),
        ("run --batch_size 0", "--num_repeats and --batch_size must be at least 1"),
        ("run --num_images 3 --metrics prc", "3 images are too few for the metric prc"),
        ("run --num_steps 21", "num_steps"),
        ("run --num_steps 4,x", "--num_steps 4,x: say something like 50 or 20,50,100"),
        ("run --num_steps 4,4", "--num_steps 4,4: names a number twice"),
        ("run --sampler ddmi", "--sampler ddmi: 'ddmi' is none of ddpm, ddim, dpmpp_2m, dpmpp_"),
        ("run --weights eam", "--weights eam: 'eam' is none of ema, raw"),
        ("run --metrics fd,fd", "--metrics fd,fd: names one of them twice"),
        ("run --metrics fid", "--metrics fid: 'fid' is none of fd, kid, is, prc"),
        ("run --metrics is", "has no classes, which the Inception Score needs"),
        (
            "run --sampler ddpm --eta 1",
            "eta belongs to the ddim sampler; leave it out, or choose ddim",
        ),
        ("run --sampler heun,dpmpp_2m --eta 1", "eta belongs to the ddim sampler"),
        ("run --spacing trailin", "spacing trailin: none of even, leading, trailing"),
        ("run --spacing ddim6", "spacing ddim6: no whole stride visits 6 of 20 timesteps"),
        ("run --spacing ddim5 --num_steps 4,5", "num_steps 4: the spacing ddim5 has 5 steps"),
        ("run --clip sttic", "clip: expected one of 'static', 'dynamic', 'none', got sttic"),
        ("run --eta 2", "eta must lie in [0, 1], got 2.0"),
        ("run --extractor inceptoin", "no extractor inceptoin; there are inception, efficient"),
        ("run --extractor tests.Nothing", "the network tests.Nothing cannot be imported"),
        ("run --extractor inception --extractor_weights nowhere", "nowhere: no such file"),
        ("alone.ckpt", "alone.ckpt: lies in no run's folder; say what to compare with by --ref"),
        ("good", "good: lies in no run's folder; say what to compare with by --reference"),
        ("good --reference nowhere/x", "--reference nowhere/x: nowhere/x is no folder here"),
        ("good --reference nowhere.npz", "--reference nowhere.npz: no such file"),
        ("good --reference broken", "--reference broken: broken/01.png cannot be decoded"),
        ("good --reference single", "the reference single: 1 images are too few"),
        ("good --reference float.npz", "float.npz: not a file of reference statistics"),
        ("good --reference pickled.npz", "pickled.npz: not a file of reference statistics"),
        ("good --reference text.npz", "text.npz: not a file of reference statistics"),
        ("good --reference extractor.npz", "extractor.npz: statistics of another extractor: wei"),
        ("good --reference cut_statistics.npz", "cut_statistics.npz: not a file of reference sta"),
        ("good --reference nameless.npz", "nameless.npz: does not say which images it is of"),
        ("good --reference sized.npz", "but those of sized.npz are 1x16x16; only images of one"),
        ("colour --reference statistics.npz", "colour: its images are 3x8x8"),
        ("good --reference statistics.npz --metrics kid", "statistics.npz: holds only moments"),
        ("good --reference digits --out full", "--out full: not empty, and nothing is overwritt"),
        ("good --reference digits --out full/x", "--out full/x: a file; choose a folder"),
        ("good --reference digits --out done", "--out done: holds another sweep"),
        ("good --watch --reference digits", "--watch: give one run's folder"),
        ("run run --watch", "--watch: give one run's folder"),
        ("run --devices many", "--accelerator, --devices or --num_nodes"),
        ("run --num_image 3", "no option --num_image; did you mean --num_images?"),
        ("run --weights raw extra", "no place for extra"),
    ],
)
def test_refused(wrong: Path, line: str, told: str) -> None:
    before, cached = tree(wrong), contents(cache(wrong))
    words = line.split()
    if "--extractor" not in words:
        words += ["--extractor", EXTRACTOR]
    result = run_here(wrong, "fid", *words, "--accelerator", "cpu")
    assert_refused(result, told)
    assert tree(wrong) == before
    added = {name.split("/")[0] for name in contents(cache(wrong)).keys() - cached.keys()}
    # what is whole may be decoded; nothing else is kept
    assert all((cache(wrong) / name / "meta.json").exists() for name in added)


def test_diverged_weights(wrong: Path) -> None:
    arguments = ("run/checkpoints/step=5.ckpt", "run/checkpoints/diverged.ckpt", "--out", "half")
    result = run_here(wrong, *options(*arguments, "--num_images", N, "--num_steps", 4))
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith("error: a sample is not finite")
    # what was judged before stays
    assert len(values(wrong / "half")) == 1


def test_a_checkpoint_that_changes_meanwhile_is_refused(here: Path) -> None:
    first, other = (here / f"run/checkpoints/step={step}.ckpt" for step in (5, 10))
    sampler = DDIMSampler(2)
    found = CheckpointReader(["ema"], [sampler])(first)
    row = SampledRow(found, "ema", sampler)
    row.open(torch.device("cpu"), 4)
    shutil.copy(other, first)
    with pytest.raises(InputError, match="step=5.ckpt: has changed since it was first read"):
        row.open(torch.device("cpu"), 4)


def test_a_run_that_cannot_be_written_has_no_curves(here: Path) -> None:
    (here / "run/fid_sweep").write_text("in the way")
    result = fid(here, "run/checkpoints/step=5.ckpt", "--num_steps", 2, "--out", "out")
    assert "no curves for TensorBoard: run/fid_sweep/curves cannot be written" in result.out
    assert len(values(here / "out")) == 1


def test_images_from_the_disk_are_shuffled(tmp_path: Path) -> None:
    """Those of a folder with a subfolder for each class would be the first classes' alone."""
    for name, level in {"black": 0, "white": 255}.items():
        (tmp_path / "both" / name).mkdir(parents=True)
        for index in range(50):
            image = torch.full((1, 8, 8), level, dtype=torch.uint8)
            image[0, 0, 0] = index
            write_png(tmp_path / "both" / name / f"{index:02}.png", image)
    (found,) = find_subjects([str(tmp_path / "both")], CheckpointReader(["ema"], []))
    assert isinstance(found, StoredImages)
    batches = StoredRow(found).open(torch.device("cpu"), 8)
    images = torch.cat(list(batches(range(100))))
    few = torch.cat(list(batches(range(20))))
    assert 5 <= int((few[:, 0, 1, 1] == 255).sum()) <= 15
    assert len({image.numpy().tobytes() for image in images}) == 100
    by_eight = torch.cat([images[start : start + 8] for start in (0, 8)])
    assert torch.equal(few[:16], by_eight)


def test_the_remedy_for_the_cache_is_told(here: Path) -> None:
    (here / "pictures").mkdir()
    for index in range(2):
        write_png(here / f"pictures/{index}.png", torch.full((1, 8, 8), index, dtype=torch.uint8))
    (here.parent / "here-cache").touch()  # a file where the folder should be
    result = run_here(here, *options("pictures", "--reference", "digits"))
    assert result.status == 2
    assert "$DDPM_LIGHTNING_CACHE" in result.err
