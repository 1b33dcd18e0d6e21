"""What happens around the training steps, on tiny runs."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD

from ddpm_lightning.callbacks import EMA, Checkpoints, Curves, Samples
from ddpm_lightning.callbacks.run_logger import RunLogger
from ddpm_lightning.callbacks.shared import TrainerRanks
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM, VALIDATION_SEED
from ddpm_lightning.samplers import SamplerName
from tests.conftest import NUM_VAL
from tests.training import (
    NUM_TIMESTEPS,
    MemoryLogger,
    Recorder,
    assert_same,
    events,
    flat_state,
    flat_weights,
    load,
    loss_by_hand,
    make_data,
    make_trainer,
    scalars,
    tiny_module,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


# --- EMA -------------------------------------------------------------------------------------


class Averages(Recorder):
    """Keeps the average after each micro-batch, too."""

    def __init__(self, ema: EMA) -> None:
        super().__init__()
        self.ema = ema
        self.averages: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.first = average_of(self.ema, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.averages.append(average_of(self.ema, pl_module))


def average_of(ema: EMA, module: DDPM) -> Tensor:
    with ema.scope(module):
        return flat_weights(module.net)


@pytest.mark.parametrize(("decay", "warmup"), [(0.3, True), (0.3, False), (0.9, True)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_the_one_by_hand(
    decay: float, warmup: bool, accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    ema = EMA(decay, warmup)
    seen = Averages(ema)
    module = tiny_module(optimizer=lambda params: SGD(params, 0.1), lr_warmup_steps=0)
    trainer = make_trainer(
        tmp_path, ema, seen, Checkpoints(), max_steps=5, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, make_data(pictures))
    assert torch.equal(seen.first, seen.initial)
    average, step = seen.initial, 0
    for now, weights, theirs in zip(seen.steps, seen.weights, seen.averages, strict=True):
        if now > step:
            step = now
            rate = min(decay, (1 + step) / (10 + step)) if warmup else decay
            average = rate * average + (1 - rate) * weights
        torch.testing.assert_close(theirs, average, rtol=1e-6, atol=1e-8)
    assert step == 5
    assert len(seen.steps) == 5 * accumulate
    assert float((average - seen.weights[-1]).abs().max()) > 1e-4
    state = load(tmp_path / "checkpoints" / "last.ckpt")["ema_state_dict"]
    assert torch.equal(flat_state(state), seen.averages[-1])


def test_no_decay_keeps_no_average(pictures: Path, tmp_path: Path) -> None:
    ema, logger = EMA(decay=0), MemoryLogger()
    trainer = make_trainer(
        tmp_path, Curves(), ema, Checkpoints(), max_steps=2, val_check_interval=2, logger=logger
    )
    trainer.fit(tiny_module(), make_data(pictures))
    assert not ema.is_active
    assert "ema_state_dict" not in load(tmp_path / "checkpoints" / "last.ckpt")
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()  # by val/loss
    assert "val/loss_ema" not in logger.scalars
    assert list(logger.scalars["val/loss"]) == [2]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, math.nan])
def test_bad_decay_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"ema.decay must lie in \[0, 1\)"):
        EMA(decay)


def test_scope_restores_come_what_may(pictures: Path, tmp_path: Path) -> None:
    ema, module = EMA(0.9), tiny_module()
    make_trainer(tmp_path, ema, max_steps=3).fit(module, make_data(pictures))
    raw, pointers = flat_weights(module.net), [p.data_ptr() for p in module.net.parameters()]
    with ema.scope(module):
        inside = flat_weights(module.net)
    assert not torch.equal(inside, raw)
    with pytest.raises(ZeroDivisionError), ema.scope(module):
        raise ZeroDivisionError
    assert torch.equal(flat_weights(module.net), raw)
    assert [p.data_ptr() for p in module.net.parameters()] == pointers
    assert torch.equal(average_of(ema, module), inside)


def test_the_average_of_a_low_precision_network_is_float32(pictures: Path, tmp_path: Path) -> None:
    ema = EMA(decay=0.999, warmup=False)
    module = tiny_module(optimizer=lambda params: SGD(params, 0.1), lr_warmup_steps=0)
    trainer = make_trainer(tmp_path, ema, Checkpoints(), max_steps=3, precision="bf16-true")
    trainer.fit(module, make_data(pictures))
    checkpoint = load(tmp_path / "checkpoints" / "last.ckpt")
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.bfloat16}
    averages = checkpoint["ema_state_dict"].values()
    assert {value.dtype for value in averages} == {torch.float32}
    # a step of 1/1000 is lost in bfloat16, but not here
    assert any(not torch.equal(value, value.bfloat16().float()) for value in averages)
    with ema.scope(module):
        assert {p.dtype for p in module.net.parameters()} == {torch.bfloat16}


# --- Curves ----------------------------------------------------------------------------------


def train_logged(
    folder: Path, pictures: Path, steps: int, accumulate: int = 1, **options: Any
) -> tuple[MemoryLogger, Recorder]:
    logger, recorder = MemoryLogger(), Recorder()
    trainer = make_trainer(
        folder,
        Curves(),
        recorder,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=logger,
        **{"log_every_n_steps": 3, **options},
    )
    trainer.fit(tiny_module(), make_data(pictures))
    return logger, recorder


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_losses_are_means_since_the_last_log(
    accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    logger, seen = train_logged(tmp_path, pictures, 7, accumulate)
    losses, t = torch.cat(seen.losses).double(), torch.cat(seen.t)
    for step, window in {3: slice(0, 24), 6: slice(24, 48), 7: slice(48, 56)}.items():
        some, some_t = losses[window], t[window]
        assert logger.scalars["train/loss"][step] == pytest.approx(float(some.mean()), rel=1e-12)
        for quarter in range(4):
            low, high = NUM_TIMESTEPS * quarter // 4, NUM_TIMESTEPS * (quarter + 1) // 4
            expected = float(some[(some_t >= low) & (some_t < high)].mean())
            value = logger.scalars[f"train/loss_q{quarter + 1}"][step]
            assert value == pytest.approx(expected, rel=1e-12, nan_ok=True)
        stepped = seen.steps.index(step)
        assert logger.scalars["train/grad_norm"][step] == seen.grad_norms[stepped]
        assert logger.scalars["train/lr"][step] == 1e-3
        assert logger.scalars["train/images_per_second"][step] > 0
    assert list(logger.scalars["train/loss"]) == [3, 6, 7]
    assert len(losses) == 56


def test_train_loss_does_not_depend_on_accumulation(pictures: Path, tmp_path: Path) -> None:
    whole, _ = train_logged(tmp_path, pictures, 6)
    halves, _ = train_logged(tmp_path, pictures, 6, accumulate=2)
    for tag in ("train/loss", *(f"train/loss_q{quarter}" for quarter in (1, 2, 3, 4))):
        assert halves.scalars[tag] == pytest.approx(whole.scalars[tag], rel=1e-4)


def test_no_interval_logs_the_last_step(pictures: Path, tmp_path: Path) -> None:
    logger, seen = train_logged(tmp_path, pictures, 3, log_every_n_steps=0)
    expected = float(torch.cat(seen.losses).double().mean())
    assert logger.scalars["train/loss"] == {3: pytest.approx(expected, rel=1e-12)}


def validation_by_hand(module: DDPM, data: ImageDataModule) -> float:
    (loader,) = data.val_dataloader()
    images = torch.cat([batch.images for batch in loader])
    assert len(images) == NUM_VAL
    with torch.no_grad():
        losses = [
            loss_by_hand(module.net, image, position, VALIDATION_SEED)
            for position, image in enumerate(images)
        ]
    return float(torch.stack(losses).double().mean())


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_validation_losses_are_those_by_hand(
    batch_size: int, pictures: Path, tmp_path: Path
) -> None:
    """Seven images, so the last batch is smaller; the loss is a mean over images all the same."""
    module, data = tiny_module(), make_data(pictures, batch_size=batch_size)
    logger, ema = MemoryLogger(), EMA(0.9)
    trainer = make_trainer(
        tmp_path, Curves(), ema, max_steps=4, val_check_interval=2, logger=logger
    )
    trainer.fit(module, data)
    by_hand = validation_by_hand(module, data)
    assert list(logger.scalars["val/loss"]) == [2, 4]
    assert logger.scalars["val/loss"][4] == pytest.approx(by_hand, rel=1e-5)
    with ema.scope(module):
        average_by_hand = validation_by_hand(module, data)
    assert logger.scalars["val/loss_ema"][4] == pytest.approx(average_by_hand, rel=1e-5)
    assert average_by_hand != pytest.approx(by_hand, rel=1e-4)


def test_validation_leaves_the_weights_alone(pictures: Path, tmp_path: Path) -> None:
    def train(val_check_interval: int) -> Tensor:
        module = tiny_module()
        trainer = make_trainer(
            tmp_path, EMA(0.9), Curves(), max_steps=4, val_check_interval=val_check_interval
        )
        trainer.fit(module, make_data(pictures))
        return flat_weights(module.net)

    assert torch.equal(train(1), train(100))


def test_tensorboard_has_every_curve_at_its_step(pictures: Path, tmp_path: Path) -> None:
    accumulate = 2
    trainer = make_trainer(
        tmp_path,
        Curves(),
        EMA(),
        Samples(every_n_steps=2, num_images=2, num_steps=4),
        Checkpoints(),
        max_steps=5,
        log_every_n_steps=2,
        val_check_interval=3 * accumulate,  # Lightning counts micro-batches
        accumulate_grad_batches=accumulate,
        logger=RunLogger(tmp_path, name="", version="", default_hp_metric=False),
    )
    trainer.fit(tiny_module(), make_data(pictures))
    names = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "lr")
    expected = {f"train/{name}": [2, 4, 5] for name in (*names, "images_per_second", "tflops")}
    expected |= {"val/loss": [3], "val/loss_ema": [3]}
    for name in ("mean", "std"):
        for source in ("samples", "data"):
            expected[f"channel_0/{name}_{source}"] = [2, 4, 5]
    for name in ("distance_samples", "distance_val", "ratio"):
        expected[f"neighbours/{name}"] = [2, 4, 5]
    written = events(tmp_path)
    assert set(written.Tags()["scalars"]) == set(expected)
    for tag, steps in expected.items():
        assert list(scalars(tmp_path, tag)) == steps, tag
    pictures_of = {
        tag: [image.step for image in written.Images(tag)] for tag in written.Tags()["images"]
    }
    drawn = ("samples/raw", "samples/ema", "samples/denoising", "neighbours")
    assert pictures_of == {name: [2, 4, 5] for name in drawn}
    data = make_data(pictures).channel_statistics
    assert scalars(tmp_path, "channel_0/mean_data")[5] == pytest.approx(float(data[0]))
    assert scalars(tmp_path, "channel_0/std_data")[5] == pytest.approx(float(data[1]))


# --- Samples ---------------------------------------------------------------------------------


def test_grids_are_drawn_where_they_are_due(pictures: Path, tmp_path: Path) -> None:
    samples = Samples(every_n_steps=2, num_images=4, num_steps=3)
    make_trainer(tmp_path, samples, max_steps=5, accumulate_grad_batches=2).fit(
        tiny_module(), make_data(pictures)
    )
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == ["step=2.png", "step=4.png", "step=5.png"]
    assert samples.latest == tmp_path / "samples" / "step=5.png"


def test_no_interval_draws_nothing(pictures: Path, tmp_path: Path) -> None:
    samples = Samples(every_n_steps=0)  # 50 steps would be too many here, if it drew
    make_trainer(tmp_path, samples, max_steps=2).fit(tiny_module(), make_data(pictures))
    assert not (tmp_path / "samples").exists()
    assert samples.latest is None


def test_impossible_samples_are_refused(pictures: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"every_n_steps": -1}, {"num_images": 0}, {"num_train": -1}]
    for options in wrong:
        with pytest.raises(InputError, match="samples"):
            Samples(**options)
    trainer = make_trainer(tmp_path, Samples(num_steps=50), max_steps=1)
    with pytest.raises(InputError, match=r"--samples.num_steps must lie in 1\.\.20, got 50"):
        trainer.fit(tiny_module(), make_data(pictures))


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_drawing_changes_nothing(sampler: SamplerName, pictures: Path, tmp_path: Path) -> None:
    """Every sampler draws the grid that `sample` gives, and training does not notice."""

    def train(folder: Path, *callbacks: Callback) -> tuple[DDPM, EMA]:
        module, ema = tiny_module(), EMA(0.5)
        trainer = make_trainer(folder, ema, *callbacks, Checkpoints(), max_steps=4)
        trainer.fit(module, make_data(pictures))
        return module, ema

    samples = Samples(every_n_steps=1, num_images=4, sampler=sampler, num_steps=6)
    drawn, ema = train(tmp_path / "drawn", samples)
    train(tmp_path / "plain")
    one, other = (
        load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("drawn", "plain")
    )
    for key in ("state_dict", "ema_state_dict", "optimizer_states"):
        assert_same(one[key], other[key])

    with ema.scope(drawn):
        images = drawn.sample(range(4), sampler, 6)
    pixels = np.asarray(Image.open(tmp_path / "drawn" / "samples" / "step=4.png"))
    cell = pixels.shape[0] // 2  # two by two images, each enlarged
    for index, image in enumerate(images):
        part = pixels[index // 2 * cell :, index % 2 * cell :][:cell, :cell]
        assert set(np.unique(part)) == {*image.unique().tolist(), 255}


class GreyWorld(nn.Module):
    """Knows that every image is grey, x_0 = 0: predicts the noise that this leaves."""

    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
        deviation = (1 - (1 - betas).cumprod(0)).sqrt().float()
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * x / self.deviation[t][:, None, None, None]


@pytest.mark.parametrize("num_steps", [20, 10, 3, 1])
def test_the_strip_goes_from_noise_to_image(num_steps: int, pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        Samples(every_n_steps=1, num_images=6, num_steps=num_steps),
        max_steps=1,
        logger=RunLogger(tmp_path, name="", version="", default_hp_metric=False),
    )
    trainer.fit(tiny_module(GreyWorld()), make_data(pictures))
    (event,) = events(tmp_path).Images("samples/denoising")
    strip = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    columns = min(10, num_steps)
    scale = min(8, max(1, round(512 / (8 * columns))))
    gap, size = max(2, scale // 2), 8 * scale
    assert strip.shape == (8 * (size + gap) + gap, columns * (size + gap) + gap)

    def cells(column: int, first_row: int) -> Iterator[Any]:
        left = gap + column * (size + gap)
        for row in range(first_row, 8, 2):
            top = gap + row * (size + gap)
            yield strip[top : top + size, left : left + size]

    deviations = [float(np.std(list(cells(column, 0)))) for column in range(columns)]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] > 5 or columns == 1
    assert deviations[-1] <= 0.5  # grey is 127.5, between two levels
    for column in range(columns):
        for pred_x_0 in cells(column, 1):
            assert set(np.unique(pred_x_0)) <= {127, 128}


# --- Checkpoints -----------------------------------------------------------------------------


class ScriptedLoss(Callback):
    """Logs validation losses that are known beforehand, {step: loss}."""

    def __init__(self, losses: dict[int, float], name: str = "val/scripted") -> None:
        self.losses = losses
        self.name = name

    @property
    def state_key(self) -> str:
        return self.name

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log(self.name, self.losses[trainer.global_step], logger=False)


def train_saving(
    folder: Path,
    pictures: Path,
    checkpoints: Checkpoints,
    *callbacks: Callback,
    steps: int,
    resume: Path | None = None,
    **options: Any,
) -> None:
    options = {"val_check_interval": 100, **options}
    trainer = make_trainer(
        folder, Curves(), EMA(), *callbacks, checkpoints, max_steps=steps, **options
    )
    trainer.fit(tiny_module(), make_data(pictures), ckpt_path=resume)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_checkpoints_are_kept_as_documented(pictures: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    checkpoints = Checkpoints(every_n_steps=2, keep_every_n_steps=3)
    train_saving(tmp_path, pictures, checkpoints, recorder, steps=7)
    assert names(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=6.ckpt", "step=7.ckpt"]
    assert recorder.at("save") == [2, 3, 4, 6, 7]
    folder = tmp_path / "checkpoints"
    for step in (3, 6, 7):
        assert load(folder / f"step={step}.ckpt")["global_step"] == step
    assert load(folder / "last.ckpt")["global_step"] == 7
    assert (folder / "last.ckpt").samefile(folder / "step=7.ckpt")
    assert not (folder / "last.ckpt").samefile(folder / "step=6.ckpt")


@pytest.mark.parametrize(
    ("every", "keep", "saves", "kept"),
    [(0, 0, [5], [5]), (2, 0, [2, 4, 5], [5]), (0, 2, [2, 4, 5], [2, 4, 5]), (9, 9, [5], [5])],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_intervals_of_zero(
    every: int,
    keep: int,
    saves: list[int],
    kept: list[int],
    accumulate: int,
    pictures: Path,
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    train_saving(
        tmp_path,
        pictures,
        Checkpoints(every, keep),
        recorder,
        steps=5,
        accumulate_grad_batches=accumulate,
    )
    assert recorder.at("save") == saves
    assert names(tmp_path) == ["last.ckpt", *(f"step={step}.ckpt" for step in kept)]


def test_bad_intervals_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"every_n_steps": -1}, {"keep_every_n_steps": -1}]
    for options in wrong:
        with pytest.raises(InputError, match="checkpoints"):
            Checkpoints(**options)


def test_best_is_the_lowest_and_survives_resuming(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def train(losses: dict[int, float], resume: bool) -> int:
        train_saving(
            tmp_path,
            pictures,
            Checkpoints(monitor="val/scripted"),
            ScriptedLoss(losses),
            steps=max(losses),
            resume=folder / "last.ckpt" if resume else None,
            val_check_interval=1,
        )
        step: int = load(folder / "best.ckpt")["global_step"]
        return step

    assert train({1: 3.0, 2: 1.0, 3: 2.0}, resume=False) == 2
    assert not (folder / "best.ckpt").samefile(folder / "last.ckpt")
    assert train({4: 1.5, 5: math.nan}, resume=True) == 2
    assert train({6: 0.5, 7: 0.5}, resume=True) == 6


def test_the_best_by_another_metric_is_replaced(pictures: Path, tmp_path: Path) -> None:
    """A low loss must not stand in the way of a distance, which is a larger number."""
    best = tmp_path / "checkpoints" / "best.ckpt"
    first = ScriptedLoss({1: 1.0})
    train_saving(
        tmp_path,
        pictures,
        Checkpoints(monitor="val/scripted"),
        first,
        steps=1,
        val_check_interval=1,
    )
    again = ScriptedLoss({2: 40.0, 3: 50.0}, "val/other")
    train_saving(
        tmp_path,
        pictures,
        Checkpoints(monitor="val/other"),
        again,
        steps=3,
        resume=best.with_name("last.ckpt"),
        val_check_interval=1,
    )
    assert load(best)["global_step"] == 2


def test_best_follows_the_average_or_else_the_raw_weights(pictures: Path, tmp_path: Path) -> None:
    raw = ScriptedLoss({1: 1.0, 2: 2.0}, "val/loss")
    average = ScriptedLoss({1: 2.0, 2: 1.0}, "val/loss_ema")
    for losses, best in (([raw, average], 2), ([raw], 1)):
        folder = tmp_path / str(best)
        trainer = make_trainer(folder, *losses, Checkpoints(), max_steps=2, val_check_interval=1)
        trainer.fit(tiny_module(), make_data(pictures))
        assert load(folder / "checkpoints" / "best.ckpt")["global_step"] == best


def test_a_metric_that_does_not_exist_is_named(pictures: Path, tmp_path: Path) -> None:
    callbacks = Curves(), Checkpoints(monitor="val/los")
    trainer = make_trainer(tmp_path, *callbacks, max_steps=1, val_check_interval=1)
    with pytest.raises(InputError, match="--checkpoints.monitor val/los: .* there are val/loss"):
        trainer.fit(tiny_module(), make_data(pictures))


def test_it_is_saved_after_validation_where_both_are_due(pictures: Path, tmp_path: Path) -> None:
    for accumulate in (1, 2):
        folder, recorder = tmp_path / str(accumulate), Recorder()
        train_saving(
            folder,
            pictures,
            Checkpoints(every_n_steps=2, keep_every_n_steps=2, monitor="val/scripted"),
            ScriptedLoss({4: 1.0, 8: 2.0}),
            recorder,
            steps=9,
            val_check_interval=4 * accumulate,
            accumulate_grad_batches=accumulate,
        )
        happened = [event for event in recorder.events if event[0] != "batch"]
        assert happened == [
            ("save", 2),
            ("validation", 4),
            ("save", 4),
            ("save", 6),
            ("validation", 8),
            ("save", 8),
            ("save", 9),
        ]
        saved = folder / "checkpoints"
        assert (saved / "best.ckpt").samefile(saved / "step=4.ckpt")
        assert not (saved / "best.ckpt").samefile(saved / "last.ckpt")


def test_without_validation_images_all_is_saved(pictures: Path, tmp_path: Path) -> None:
    data = make_data(pictures, val_fraction=0.0)
    options = {"max_steps": 9, "val_check_interval": 4}
    trainer = make_trainer(tmp_path, Checkpoints(2, 4), **options)
    trainer.fit(tiny_module(), data)
    assert names(tmp_path) == ["last.ckpt", "step=4.ckpt", "step=8.ckpt", "step=9.ckpt"]


def test_half_written_files_are_removed(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.part123").write_bytes(b"half")
    make_trainer(tmp_path, Checkpoints(), max_steps=1).fit(tiny_module(), make_data(pictures))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step=1.ckpt",
    ]


def test_curves_are_flushed_before_a_checkpoint(pictures: Path, tmp_path: Path) -> None:
    """A run that is killed and goes on from a checkpoint must not miss what came before it."""
    flushed: list[dict[str, list[int]]] = []

    class Buffered(MemoryLogger):
        def save(self) -> None:
            self.on_disk = {tag: list(curve) for tag, curve in self.scalars.items()}

    class Reader(Callback):
        def on_save_checkpoint(
            self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
        ) -> None:
            flushed.append(logger.on_disk)

    logger = Buffered()
    train_saving(
        tmp_path,
        pictures,
        Checkpoints(every_n_steps=2),
        Reader(),
        steps=2,
        log_every_n_steps=2,
        val_check_interval=2,
        logger=logger,
    )
    for curves in flushed:
        assert [curves[tag] for tag in ("train/loss", "val/loss", "val/loss_ema")] == [[2]] * 3
    assert len(flushed) == 1  # after the validation; the end is the same step


def test_a_failing_write_leaves_the_old_file(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def fail_at_step_4(checkpoint: dict[str, Any], file: Any) -> None:
        save(checkpoint, file)
        if checkpoint["global_step"] == 4:
            file.truncate(100)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail_at_step_4)
    with pytest.raises(OSError, match="No space left"):
        train_saving(tmp_path, pictures, Checkpoints(every_n_steps=2), steps=6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_file_systems_without_hard_links(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    train_saving(tmp_path, pictures, Checkpoints(), steps=1)
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"]
    one, other = (tmp_path / "checkpoints" / name for name in names(tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_sums_of_the_cpu_are_exchanged_on_the_device() -> None:
    """As those of a user's extractor that has no weights, and so no device."""
    device = torch.device("meta")
    seen = []

    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        seen.append(tensor.device)
        return torch.tensor([2.0])

    strategy = SimpleNamespace(root_device=device, reduce=reduce)
    trainer = SimpleNamespace(strategy=strategy, world_size=2, global_rank=0)
    total = TrainerRanks(trainer).sum(torch.ones(1))  # type: ignore[arg-type]
    assert seen == [device]
    assert total.device.type == "cpu"
