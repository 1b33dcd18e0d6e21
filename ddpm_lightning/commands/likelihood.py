"""`likelihood`: bits/dim of images under a checkpoint, its terms, rate and distortion."""

import csv
import io
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.batch_task import BatchTask
from ddpm_lightning.commands.likelihood_charts import draw
from ddpm_lightning.commands.loading import load_unchanged
from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.references import open_reference
from ddpm_lightning.commands.rows import describe_checkpoint
from ddpm_lightning.commands.settings import claim_folder
from ddpm_lightning.commands.shell import announce, run_command
from ddpm_lightning.commands.subjects import Checkpoint, CheckpointReader
from ddpm_lightning.commands.trainer import make_trainer
from ddpm_lightning.data.batches import Batch, Images
from ddpm_lightning.diffusion.likelihood import Bound, rate_distortion
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically
from ddpm_lightning.metrics.record import Record, make_record, read_record, write_record
from ddpm_lightning.module import DDPM, VALIDATION_SEED
from ddpm_lightning.randomness import NUM_SEEDS
from ddpm_lightning.runs import is_rank_zero
from ddpm_lightning.samplers import DDPMSampler

Split = Literal["train", "val", "test"]

GIVE = "name the images by --source (a data set)"


def likelihood(
    checkpoint: str,
    split: Split = "test",
    num_images: int | None = None,
    source: str | None = None,
    weights: Weights = "ema",
    num_steps: int | None = None,
    seed: int = VALIDATION_SEED,
    out: str | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Give the variational bound on the negative log-likelihood of images, in bits/dim.

    All its terms are computed, each t with noise of its own. Writes OUT/record.json, terms.csv,
    likelihood.csv (rate and distortion at each t) and rate_distortion.png. An interrupted run goes
    on where it stopped when the same command is given again.

    Args:
        checkpoint: A .ckpt file of a run.
        split: Which images: train, val or test, as `fit` has them.
        num_images: The first so many of them; all by default.
        source: A data set as --data.source takes it, brought to the checkpoint's size and channels;
            by default the run's own.
        weights: The moving average, or the raw weights.
        num_steps: Timesteps to visit; all by default. With fewer it is the bound of the model that
            visits only these: quicker, and larger.
        seed: Of the noise; an image's depends on it and on the image's place in the split alone.
        out: The output folder; RUN/likelihood/step=N-WEIGHTS-SPLIT-IMAGES-STEPS when left out.
        batch_size: Images at a time on each device.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
        devices: Number of devices, or auto.
        num_nodes: Number of machines.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")
    if not 0 <= seed < NUM_SEEDS:
        raise InputError(f"--seed {seed}: must lie in 0..{NUM_SEEDS - 1}")
    visits = DDPMSampler(num_steps)
    found = CheckpointReader([weights], [visits])(Path(checkpoint))
    process = visits.respace(found.process)
    _check_variance(process)
    images, name = _open_split(found, source, split)
    count = len(images) if num_images is None else num_images
    if not 1 <= count <= len(images):
        raise InputError(f"--num_images {count}: {name} has 1 to {len(images)} {split} images")
    trainer = make_trainer(accelerator, devices, num_nodes)
    settings = {
        "checkpoint": str(found.path),
        "checkpoint_sha256": found.sha256,
        "weights": weights,
        "num_steps": process.num_timesteps,
        "images_sha256": images.sha256,
        "num_images": count,
        "seed": seed,
        "batch_size": batch_size,
    }
    folder = Path(out) if out else _default_folder(found, weights, split, count, process)
    if is_rank_zero():
        claim_folder(folder, settings, "holds a likelihood")
    if (folder / "record.json").exists():
        if is_rank_zero():
            announce(_summary(read_record(folder / "record.json"), folder))
        return
    model = load_unchanged(found.path, found.sha256, weights)
    task = BoundTask(model, process, images, count, batch_size, seed, folder / "parts")
    trainer.predict(task, return_predictions=False)
    if not trainer.is_global_zero:
        return
    bound, seconds = task.read()
    protocol = {
        "bound": "all terms, each t with fresh noise; pred_x_0 clamped to [-1, 1]",
        "images_sha256": images.sha256,
        "image_shape": list(images.image_shape),
        "seed": seed,
        **({"labels": "none: the unconditional model"} if found.num_classes else {}),
    }
    subject = {
        **describe_checkpoint(found, weights),
        "source": name,
        "split": split,
        "num_steps": process.num_timesteps,
        "batch_size": batch_size,
        "world_size": trainer.world_size,
    }
    device = trainer.strategy.root_device
    record = make_record(summarise(bound), count, protocol, subject, seconds, device, [])
    _write(folder, record, bound, process)
    announce(_summary(record, folder))


class BoundTask(BatchTask):
    """Computes the bound of batches of images.

    Args:
        model: The model, its weights chosen.
        process: Its process, or that of fewer timesteps.
        images: The split.
        num_images: The first so many of it.
        batch_size: Images in a batch.
        seed: Of the noise.
        folder: Where the batches' results go.
    """

    def __init__(
        self,
        model: DDPM,
        process: Process,
        images: Images,
        num_images: int,
        batch_size: int,
        seed: int,
        folder: Path,
    ) -> None:
        super().__init__(range(num_images), batch_size, "bits/dim", process.num_timesteps)
        self.model = model
        self.process = process  # a submodule, which follows the device
        self._images = images
        self._seed = seed
        self._folder = folder

    def make(self, numbers: Sequence[int]) -> None:
        """Compute a batch and write it."""
        start = time.perf_counter()
        positions = np.array(numbers)
        batch = Batch(torch.from_numpy(self._images[positions]), positions)
        bound = self.model.bound(
            batch, self.process, self._seed, lambda: self.advance(len(numbers))
        )
        if not bound.total.isfinite().all():
            raise InputError(
                "the bound is not finite: the weights have diverged; take an earlier checkpoint"
            )
        arrays = {key: value.cpu().numpy() for key, value in bound._asdict().items()}
        seconds = time.perf_counter() - start
        self._folder.mkdir(exist_ok=True)
        write_atomically(
            self._path(numbers), lambda file: np.savez(file, seconds=seconds, **arrays)
        )

    def is_done(self, numbers: Sequence[int]) -> bool:
        """Whether its file is there."""
        return self._path(numbers).exists()

    def read(self) -> tuple[Bound, float]:
        """Give the bound of all images, in order, and the seconds it took on all devices."""
        parts = []
        for batch in self._batches:
            with np.load(self._path(batch)) as arrays:
                parts.append({key: torch.from_numpy(arrays[key]) for key in arrays.files})
        joined = {key: torch.cat([part[key] for part in parts]) for key in Bound._fields}
        return Bound(**joined), sum(float(part["seconds"]) for part in parts)

    def _path(self, numbers: Sequence[int]) -> Path:
        return self._folder / f"{numbers[0]:06d}.npz"


def summarise(bound: Bound) -> dict[str, float]:
    """Give the mean bound over images, in bits/dim, and the three parts whose sum it is.

    Returns:
        bits_per_dim: The bound.
        prior: L_T.
        rate_terms: L_1 to L_{T-1} together.
        l_0: L_0.
        standard_error: Of bits_per_dim, over images; not given for one.
    """
    terms = bound.terms.double().mean(dim=0)
    parts = {
        "prior": float(bound.prior.double().mean()),
        "rate_terms": float(terms[1:].sum()),
        "l_0": float(terms[0]),
    }
    metrics = {"bits_per_dim": sum(parts.values()), **parts}
    num_images = len(bound.prior)
    if num_images > 1:
        metrics["standard_error"] = float(bound.total.std()) / math.sqrt(num_images)
    return metrics


def _check_variance(process: Process) -> None:
    """Refuse at once a learned variance that is that of other steps."""
    output, x_t = torch.zeros(1, process.count_outputs(1), 1, 1), torch.zeros(1, 1, 1, 1)
    process.p_mean_variance(output, x_t, process.timesteps.new_zeros(1))


def _open_split(checkpoint: Checkpoint, source: str | None, split: Split) -> tuple[Images, str]:
    """Open the images, and say what they are called."""
    data = open_reference(source, [checkpoint], "--source", GIVE)
    sets = {"train": data.train_images, "val": data.val_images, "test": data.test_images}
    images = sets[split]
    if images is None:
        raise InputError(
            f"--split {split}: {data.source} has no such images; take --split train, or name a "
            "data set that has them by --source"
        )
    return images, data.source


def _default_folder(
    checkpoint: Checkpoint, weights: Weights, split: Split, count: int, process: Process
) -> Path:
    run = checkpoint.run
    parent = checkpoint.path.parent if run is None else run.root
    name = f"step={checkpoint.step}-{weights}-{split}-{count}-{process.num_timesteps}"
    return parent / "likelihood" / name


def _write(folder: Path, record: Record, bound: Bound, process: Process) -> None:
    """Write the tables, the picture and, when all else is there, the record."""
    timesteps = process.timesteps.tolist()
    rate, rmse = rate_distortion(bound)
    means = [part.double().mean(dim=0) for part in (bound.terms, bound.x_0_mse, bound.noise_mse)]
    _write_table(folder / "likelihood.csv", ["rate_bits_per_dim", "rmse"], timesteps, [rate, rmse])
    names = ["term_bits_per_dim", "x_0_mse", "noise_mse"]
    _write_table(folder / "terms.csv", names, timesteps, means)
    draw(folder / "rate_distortion.png", rate, rmse, record)
    write_record(folder / "record.json", record)
    shutil.rmtree(folder / "parts")


def _write_table(
    path: Path, names: Sequence[str], timesteps: Sequence[int], columns: Iterable[Tensor]
) -> None:
    """Write a row for each t, in the order in which the reverse process comes by."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["t", *names])
    rows = zip(timesteps, *(column.tolist() for column in columns), strict=True)
    writer.writerows(reversed(list(rows)))
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _summary(record: Record, folder: Path) -> str:
    metrics, subject = record["metrics"], record["subject"]
    error = metrics.get("standard_error")
    spread = "" if error is None else f" ± {error:.4f} (standard error over images)"
    last = subject["num_steps"] - 1
    between = f" + L_1 to L_{last} {metrics['rate_terms']:.5f}" if last else ""
    return (
        f"bits/dim: {metrics['bits_per_dim']:.4f}{spread}, {record['num_images']:,} "
        f"{subject['split']} images\n"
        f"  = L_T {metrics['prior']:.5f} (prior){between} + L_0 {metrics['l_0']:.5f}\n"
        f"record, tables and picture: {folder}"
    )


def main() -> int:
    """Run `likelihood` with the options of sys.argv."""
    options: dict[str, Any] = parse_options(likelihood, "likelihood")
    return run_command(lambda: likelihood(**options))
