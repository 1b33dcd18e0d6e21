"""Judging while it trains."""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from numpy.typing import NDArray
from PIL import Image

from ddpm_lightning import DDPM
from ddpm_lightning.callbacks import EMA, FID, Checkpoints, Curves
from ddpm_lightning.callbacks.run_logger import RunLogger
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.judge import Collector, evaluate
from ddpm_lightning.samplers import SamplerName
from tests.command_line import TINY, run_here, run_process
from tests.extractors import Small
from tests.training import (
    assert_same,
    assert_same_training,
    events,
    load,
    make_data,
    make_trainer,
    save,
    scalars,
    tiny_module,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

EXTRACTOR = f"{Small.__module__}.{Small.__qualname__}"
NAME = "fd_Small_6"


def fid(**options: Any) -> FID:
    return FID(**{"every_n_steps": 2, "num_images": 6, "extractor": EXTRACTOR, **options})


def train(folder: Path, pictures: Path, *callbacks: Callback, **options: Any) -> None:
    logger = RunLogger(folder, name="", version="", default_hp_metric=False)
    options = {"max_steps": 5, "logger": logger, **options}
    trainer = make_trainer(folder, Curves(), EMA(0.5), *callbacks, Checkpoints(), **options)
    trainer.fit(tiny_module(), make_data(pictures))


def test_numbers_are_those_by_hand_and_have_their_record(pictures: Path, tmp_path: Path) -> None:
    callback = fid(weights=["ema", "raw"], metrics=["fd", "kid"], num_steps=3)
    train(tmp_path, pictures, callback)
    names = [
        f"{name}/{w}" for w in ("ema", "raw") for name in (NAME, "kd_Small_6", "kd_Small_std_6")
    ]
    assert callback.names == names
    for name in names:
        assert list(scalars(tmp_path, name)) == [2, 4, 5]  # where it is due, and at the end
    assert 0 < scalars(tmp_path, "fid/share_of_time")[5] < 1
    assert {path.name for path in (tmp_path / "fid").iterdir()} == {
        f"step={step}-{weights}.json" for step in (2, 4, 5) for weights in ("ema", "raw")
    }
    record = json.loads((tmp_path / "fid/step=5-ema.json").read_text())
    assert record["subject"]["step"] == 5
    assert record["subject"]["weights"] == "ema"
    assert record["subject"]["sampler"]["num_steps"] == 3
    assert record["protocol"]["num_images"] == 6
    assert record["warnings"]  # fewer images than features

    data = make_data(pictures)
    data.prepare_data()
    reference = Collector(callback.extractor, ["fd"])
    images = data.train_images
    reference.add(torch.from_numpy(images[np.arange(len(images))]))
    model = DDPM.from_checkpoint(tmp_path / "checkpoints/last.ckpt", "ema")
    samples = Collector(callback.extractor, ["fd"])
    samples.add(model.sample(range(6), "ddim", 3, batch_size=64))
    by_hand = evaluate(samples.finish(), reference.finish(), ["fd"], "fd")["fd"]
    assert record["metrics"]["fd_Small"] == pytest.approx(by_hand, rel=1e-6)


def test_every_sampler_judges(pictures: Path, tmp_path: Path) -> None:
    """By one training that judges with each, at a spacing of its own."""
    spacings = ["even", "leading", "trailing", "ddim4", "2,2"]
    names = get_args(SamplerName)
    assert len(names) == len(spacings)
    for name, spacing in zip(names, spacings, strict=True):
        callback = fid(sampler=name, num_steps=4, spacing=spacing, every_n_steps=1)
        train(tmp_path / name, pictures, callback, max_steps=1)
        subject = json.loads((tmp_path / name / "fid/step=1-ema.json").read_text())["subject"]
        assert subject["sampler"]["name"] == name
        assert subject["sampler"]["spacing"] == spacing
        assert subject["nfe"] == (7 if name == "heun" else 4)  # the last step takes one


def test_judging_changes_nothing(pictures: Path, tmp_path: Path) -> None:
    train(tmp_path / "judged", pictures, fid(num_steps=2))
    train(tmp_path / "plain", pictures)
    judged, plain = (tmp_path / name / "checkpoints/last.ckpt" for name in ("judged", "plain"))
    assert_same_training(judged, plain)
    assert_same(load(judged)["state_dict"], load(plain)["state_dict"])
    assert all(name.startswith("net.") for name in load(judged)["state_dict"])


def test_best_may_follow_a_distance(pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        EMA(0.5),
        fid(num_steps=2),
        Checkpoints(monitor=f"{NAME}/ema"),
        max_steps=4,
        val_check_interval=1,
    )
    trainer.fit(tiny_module(), make_data(pictures))
    records = {
        step: json.loads((tmp_path / f"fid/step={step}-ema.json").read_text())["metrics"]
        for step in (2, 4)
    }
    lowest = min(records, key=lambda step: records[step]["fd_Small"])
    assert load(tmp_path / "checkpoints/best.ckpt")["global_step"] == lowest


def test_a_resumed_run_goes_on_judging(pictures: Path, tmp_path: Path) -> None:
    """At the same steps, with the same numbers, as one that was not cut off."""
    train(tmp_path / "whole", pictures, fid(num_steps=2), max_steps=6)
    train(tmp_path / "cut", pictures, fid(num_steps=2), max_steps=3)
    callback = fid(num_steps=2)
    trainer = make_trainer(tmp_path / "cut", EMA(0.5), callback, max_steps=6)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    trainer.fit(tiny_module(), make_data(pictures), ckpt_path=last)
    assert {path.name for path in (tmp_path / "cut" / "fid").iterdir()} == {
        f"step={step}-ema.json" for step in (2, 3, 4, 6)
    }
    for step in (2, 4, 6):
        one, other = (
            json.loads((tmp_path / run / f"fid/step={step}-ema.json").read_text())["metrics"]
            for run in ("whole", "cut")
        )
        assert one == other


def test_the_end_is_judged_where_time_decides(pictures: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    callback = fid(num_steps=2)
    train(tmp_path, pictures, Stop(), callback, max_steps=-1)
    assert {path.name for path in (tmp_path / "fid").iterdir()} == {
        f"step={step}-ema.json" for step in (2, 3)
    }
    assert list(scalars(tmp_path, f"{NAME}/ema")) == [2, 3]


def test_no_global_random_state_is_touched(pictures: Path, tmp_path: Path) -> None:
    states: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            states.append(torch.get_rng_state())

    trainer = make_trainer(
        tmp_path, EMA(0.5), Watch(), fid(num_steps=2, every_n_steps=1), Watch(), max_steps=2
    )
    trainer.fit(tiny_module(), make_data(pictures))
    assert len(states) == 4
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])


def test_missing_inception_stops_before_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    line = "fit --config tiny.yaml --fid.every_n_steps 5 --fid.extractor inception"
    result = run_here(here, *line.split())
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "extractor_weights" in result.err
    assert "efficientnet-lite0" in result.err
    assert [path.name for path in here.iterdir()] == ["tiny.yaml"]


def test_none_is_judged(pictures: Path, tmp_path: Path) -> None:
    callback = fid(every_n_steps=0, extractor="no-such-extractor")
    train(tmp_path, pictures, callback)
    assert not callback.names
    assert not (tmp_path / "fid").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"every_n_steps": -1}, "--fid.every_n_steps"),
        ({"num_images": 1}, "--fid.num_images"),
        ({"batch_size": 0}, "--fid.batch_size"),
        ({"metrics": []}, "--fid.metrics"),
        ({"weights": []}, "--fid.weights"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        fid(**options)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--fid.num_steps 21", "--fid.num_steps must lie in 1..20, got 21"),
        ("--fid.sampler ddmp", "fid.sampler: expected one of 'ddpm', 'ddim', 'dpmpp_2m', 'dpm"),
        ("--fid.spacing leadin", "--fid.spacing leadin: none of even, leading, trailing"),
        ("--fid.spacing ddim4", "--fid.num_steps 20: the spacing ddim4 has 4 steps"),
        ("--fid.extractor inceptoin", "no extractor inceptoin"),
        ("--fid.extractor torch.nn.Nothing", "torch.nn.Nothing"),
        ("--fid.metrics [is]", "has no classes"),
        ("--fid.metrics [fdd]", "fd"),
        ("--ema.decay 0", "--fid.weights"),
    ],
)
def test_what_cannot_be_judged_stops_before_training(
    option: str, told: str, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.format(source=pictures))
    line = f"fit --config tiny.yaml --fid.every_n_steps 5 --fid.extractor {EXTRACTOR} {option}"
    result = run_here(tmp_path, *line.split())
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert told in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_two_processes_judge_as_one(pictures: Path, tmp_path: Path) -> None:
    """And draw as one. Uneven shares of the same weights: a rate of 0 leaves out training's own
    rounding."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(source=pictures))
    line = (
        "fit --config tiny.yaml --trainer.max_steps 2 --samples.every_n_steps 2 "
        "--samples.num_images 5 --fid.every_n_steps 2 --fid.num_images 7 --fid.num_steps 2 "
        "--fid.metrics [fd,kid] --fid.batch_size 2 "
        "--model.optimizer torch.optim.SGD --model.optimizer.lr 0"
    )
    values, pictures_of = [], []
    for devices in (1, 2):
        more = f"--trainer.devices {devices} --trainer.strategy {'ddp' if devices > 1 else 'auto'}"
        more += " --trainer.callbacks+=LearningRateMonitor"  # wants a logger on every rank
        result = run_process(tmp_path, *line.split(), *more.split(), "--run_dir", str(devices))
        assert result.status == 0, result.err
        record = json.loads((tmp_path / str(devices) / "fid/step=2-ema.json").read_text())
        assert record["subject"]["world_size"] == devices
        values.append(record["metrics"])
        pictures_of.append(pictures_in(tmp_path / str(devices)))
    one, two = values
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert math.isfinite(value)
        if name != "kd_efficientnet-lite0_std":  # of subsets of all images: rounding
            assert two[name] == pytest.approx(value, rel=1e-6), name
    for tag, picture in pictures_of[0].items():
        difference = np.abs(picture - pictures_of[1][tag])
        assert difference.max() <= 1, tag
        assert (difference > 0).mean() <= 1e-3, tag


def pictures_in(run: Path) -> dict[str, NDArray[np.int64]]:
    """Those drawn in a run of two steps: on disk, and in TensorBoard."""
    found = {"png": np.asarray(Image.open(run / "samples" / "step=2.png"), dtype=np.int64)}
    for tag in ("samples/raw", "samples/ema", "samples/denoising"):
        (event,) = events(run).Images(tag)
        decoded = Image.open(BytesIO(event.encoded_image_string))
        found[tag] = np.asarray(decoded, dtype=np.int64)
    return found


def owe(checkpoint: Path) -> None:
    """Let a checkpoint be one of a run that a signal stopped while its last step was judged."""
    content = load(checkpoint)
    content["callbacks"]["FID"]["is_owed"] = True
    save(content, checkpoint)


def test_best_follows_a_distance_that_was_owed(pictures: Path, tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                found.append(load(best)["global_step"])

    found: list[int] = []
    best, last = (tmp_path / f"checkpoints/{name}.ckpt" for name in ("best", "last"))
    for steps, resume in ((2, None), (3, last)):
        trainer = make_trainer(
            tmp_path,
            EMA(0.5),
            fid(num_steps=2),
            Watch(),
            Checkpoints(every_n_steps=1, monitor=f"{NAME}/ema"),
            max_steps=steps,
            val_check_interval=1,
        )
        trainer.fit(tiny_module(), make_data(pictures), ckpt_path=resume)
        if resume is None:
            owe(last)
            best.unlink()
    assert found == [2]


def test_what_is_owed_at_the_end_is_told(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.format(source=pictures))
    line = (
        "fit --config tiny.yaml --trainer.max_steps 2 --samples.every_n_steps 0 "
        "--fid.every_n_steps 2 --fid.num_images 7 --fid.num_steps 2 --run_dir run "
        "--fid.extractor tests.extractors.Small"
    )
    result = run_here(tmp_path, *line.split())
    assert result.status == 0, result.err
    assert "cut short" not in result.out
    owe(tmp_path / "run/checkpoints/last.ckpt")
    again = run_here(tmp_path, *line.split(), "--ckpt_path", "last")
    assert again.status == 0, again.err
    (told,) = [line for line in again.out.splitlines() if "cut short" in line]
    command = told.partition("-m ddpm_lightning ")[2].split()
    assert command[:2] == ["fid", "run/checkpoints/last.ckpt"]
    made_up = run_here(tmp_path, *command, "--accelerator", "cpu", "--out", "out")
    assert made_up.status == 0, made_up.err
    records = [
        json.loads((tmp_path / path).read_text())
        for path in ("run/fid/step=2-ema.json", "out/record.json")
    ]
    assert records[1]["metrics"] == pytest.approx(records[0]["metrics"], rel=1e-6)
