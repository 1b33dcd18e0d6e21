"""`sample`: turn seeds into PNGs, a grid and an animation with a checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.checkpoints import Weights, file_sha256, load_checkpoint
from ddpm_lightning.commands.batch_task import BatchTask
from ddpm_lightning.commands.options import parse_options, parse_ranges
from ddpm_lightning.commands.settings import claim_folder
from ddpm_lightning.commands.shell import announce, run_command
from ddpm_lightning.commands.told import Told, settle_told
from ddpm_lightning.commands.trainer import make_trainer
from ddpm_lightning.denoiser import finished_images
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import (
    comment_of,
    decode,
    make_class_grid,
    to_uint8,
    write_atomically,
    write_gif,
    write_png,
)
from ddpm_lightning.metrics.record import describe_sampler, sampler_slug
from ddpm_lightning.module import DDPM
from ddpm_lightning.runs import is_rank_zero
from ddpm_lightning.samplers import Clip, Sampler, SamplerName, make_sampler

GRID_IMAGES = 64
GIF_FRAMES = 50
GIF_NAME = "denoising.gif"

Format = Literal["png", "npz"]


def sample(
    checkpoint: str,
    num_images: int | None = None,
    seeds: str | None = None,
    sampler: SamplerName = "ddpm",
    num_steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: Clip | None = None,
    labels: str | None = None,
    guidance: float | None = None,
    guidance_rescale: float | None = None,
    guide: str | None = None,
    weights: Weights = "ema",
    out: str | None = None,
    format: Format = "png",
    gif: bool = False,
    batch_size: int = 64,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Turn noise into images.

    Writes OUT/000000.png and so on, named by seed, and OUT/grid.png. An interrupted run goes on
    where it stopped when the same command is given again.

    Args:
        checkpoint: A .ckpt file of a run.
        num_images: Images from seeds 0, 1, ...; 64 when neither this nor seeds is given.
        seeds: The seeds instead, such as 0-63 or 3,7,100-120.
        sampler: ddpm (ancestral), ddim, dpmpp_2m (DPM-Solver++), dpmpp_2m_sde (the same with fresh
            noise), or heun.
        num_steps: Timesteps to visit; ddpm takes all, ddim 50, dpmpp_2m and dpmpp_2m_sde 20, heun
            10. At each the network is evaluated once, by heun twice but in its last step.
        eta: Share of fresh noise for ddim, from 0 (deterministic, the default) to 1.
        spacing: Which timesteps those are: even, leading, trailing, log_snr (even in log-SNR),
            ddimN (N by a whole stride) or sections such as 10,15,20; ddpm and ddim take even, heun
            trailing, the others log_snr.
        clip: What happens to the predicted x_0: static clamps it to [-1, 1] (the default), dynamic
            scales what lies beyond into it, none leaves it.
        labels: Classes, such as 3 or 0-9 or 0,3,5: the image of seed i has the one at i modulo
            their number; by default all that the model knows.
        guidance: How strongly images are drawn towards their classes, or away from what the guide
            would make: 1 is the model alone (the default), 0 the unconditional one or the guide;
            all else takes two evaluations of a network.
        guidance_rescale: Share, from 0 (the default) to 1, of the guided prediction that is scaled
            to the contrast of the model's own.
        guide: A weaker checkpoint of the same kind, such as an early step=N.ckpt of the same run,
            whose errors are exaggerated ones of the model (autoguidance); needs no classes. With
            --guidance 1.5 or 2 samples are often better, even at half as many --num_steps, which
            cost the same.
        weights: The moving average, or the raw weights.
        out: The output folder; RUN/generated/step=N-WEIGHTS-SAMPLER-STEPS when left out. Other
            seeds may be added to it later.
        format: png writes a file per image; npz one samples.npz with arr_0, uint8 [N, H, W, C].
        gif: Also write OUT/denoising.gif, the first images' way from noise.
        batch_size: Images at a time on each device.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
        devices: Number of devices, or auto.
        num_nodes: Number of machines.
    """
    wanted = parse_seeds(seeds, num_images)
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")
    chosen = make_sampler(sampler, num_steps, eta, spacing, clip)
    model = DDPM.from_checkpoint(checkpoint, weights)
    chosen.respace(model.process)  # refuses timesteps that the schedule does not have
    told = settle_told(model, labels, guidance, guidance_rescale, guide)
    guiding = None if told.guide is None else told.guide.load(weights, model)
    sha256 = file_sha256(checkpoint)
    if told.guide is not None and told.guide.sha256 == sha256:
        raise InputError(f"--guide {guide}: is the checkpoint itself; name an earlier one")
    trainer = make_trainer(accelerator, devices, num_nodes)
    description = describe_sampler(chosen, chosen.count_steps(model.process))
    slug = sampler_slug(description) + told.slug
    folder = Path(out or _default_folder(Path(checkpoint), weights, slug))
    settings = {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": sha256,
        "weights": weights,
        "sampler": description,
        "batch_size": batch_size,
        **told.describe(),
    }
    if format == "npz":  # one file, which cannot grow
        settings |= {"format": format, "seeds": seeds_to_text(wanted)}
    if is_rank_zero():
        claim_folder(folder, settings, "holds samples")
    if format == "npz" and (folder / "samples.npz").exists():
        announce(f"samples: {folder} (they were there already)")
        if gif and not (folder / GIF_NAME).exists():
            raise InputError(f"--gif: {folder} was sampled without it; give another --out")
        return
    task = SampleTask(model, chosen, wanted, batch_size, folder, gif, told, guiding)
    trainer.predict(task, return_predictions=False)
    if trainer.is_global_zero:
        _finish(folder, wanted, format, told)
        announce(f"samples: {folder}\ngrid: {folder / 'grid.png'}")


class SampleTask(BatchTask):
    """Samples batches of seeds.

    Args:
        model: The model, its weights chosen.
        sampler: The sampler.
        seeds: All of them.
        batch_size: Seeds in a batch.
        folder: Where the PNGs go.
        gif: Keep the first batch's chain as an animation.
        told: What they are told.
        guide: What guides them.
    """

    def __init__(
        self,
        model: DDPM,
        sampler: Sampler,
        seeds: Sequence[int],
        batch_size: int,
        folder: Path,
        gif: bool,
        told: Told,
        guide: DDPM | None = None,
    ) -> None:
        super().__init__(seeds, batch_size, "sampling", sampler.count_steps(model.process))
        self.model = model
        self.guide = guide
        self._told = told
        self._sampler = sampler
        self._folder = folder
        self._gif = gif

    def make(self, seeds: Sequence[int]) -> None:
        """Sample a batch and write it; the bar advances with every step of the chain."""
        labels = self._told.labels_of(seeds)
        frames = _Frames(self._num_steps, labels) if self._shows(seeds) else None
        step = None
        for step in self.model.denoise(
            seeds,
            self._sampler,
            labels=labels,
            guidance=self._told.guidance,
            guide=self.guide,
        ):
            self.advance(len(seeds))
            if frames is not None:
                frames.add(step.x_prev)
        assert step is not None
        if frames is not None:
            write_gif(self._folder / GIF_NAME, frames.kept, seeds_to_text(seeds))
        for seed, image in zip(seeds, finished_images(step), strict=True):
            write_png(_path(self._folder, seed), image)

    def is_done(self, seeds: Sequence[int]) -> bool:
        """Whether the PNGs, and the GIF if it is to show this batch, are there."""
        # a GIF of an earlier call may show other seeds
        if self._shows(seeds) and comment_of(self._folder / GIF_NAME) != seeds_to_text(seeds):
            return False
        return all(_path(self._folder, seed).exists() for seed in seeds)

    def _shows(self, seeds: Sequence[int]) -> bool:
        return self._gif and seeds[0] == self._batches[0][0]


class _Frames:
    """Keeps some of a chain's states as grids, the last one among them."""

    def __init__(self, num_steps: int, labels: Sequence[int] | None) -> None:
        self.kept: list[Tensor] = []
        self._labels = labels and labels[:GRID_IMAGES]
        self._num_steps = num_steps
        self._index = 0

    def add(self, x: Tensor) -> None:
        left = self._num_steps - 1 - self._index
        if left % max(1, self._num_steps // GIF_FRAMES) == 0:
            self.kept.append(make_class_grid(to_uint8(x[:GRID_IMAGES]).cpu(), self._labels))
        self._index += 1


def parse_seeds(seeds: str | None, num_images: int | None, default: int = GRID_IMAGES) -> list[int]:
    """Read a list of seeds such as 0-63 or 3,7,100-120.

    Args:
        seeds: The list; 0, 1, ... when None.
        num_images: How many those are.
        default: How many, where neither is given.

    Raises:
        InputError: It is none, is empty, names a seed twice, or disagrees with num_images.
    """
    if seeds is None:
        if num_images is not None and num_images < 1:
            raise InputError(f"--num_images must be at least 1, got {num_images}")
        return list(range(num_images or default))
    result = parse_ranges("--seeds", seeds, "0-63 or 3,7,100-120")
    if len(set(result)) < len(result):
        raise InputError(f"--seeds {seeds}: names a seed twice")
    if num_images not in (None, len(result)):
        raise InputError(
            f"--seeds names {len(result)} images, --num_images {num_images}: one will do"
        )
    return result


def seeds_to_text(seeds: Sequence[int]) -> str:
    """Write seeds as the ranges that `parse_seeds` reads."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)


def _path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def _default_folder(checkpoint: Path, weights: Weights, slug: str) -> Path:
    """Name a folder by what its images depend on; last.ckpt is another one tomorrow."""
    step = load_checkpoint(checkpoint)["global_step"]
    name = f"step={step}-{weights}-{slug}"
    in_run = checkpoint.absolute().parent.name == "checkpoints"
    folder = checkpoint.parent if in_run else checkpoint
    # within checkpoints/ the folder above is no part of the path
    above = Path("..") if folder == Path() else folder.parent
    return above / "generated" / name


def _finish(folder: Path, seeds: Sequence[int], format: Format, told: Told) -> None:
    """Lay out the grid; for npz, gather the images in one file and remove theirs."""
    images = _iterate(folder, seeds)
    first = torch.stack([image for image, _ in zip(images, range(GRID_IMAGES), strict=False)])
    labels = told.labels_of(seeds)
    write_png(folder / "grid.png", make_class_grid(first, labels and labels[:GRID_IMAGES]))
    if format == "npz":
        arrays = torch.stack(list(_iterate(folder, seeds))).permute(0, 2, 3, 1).numpy()
        named = {"arr_0": arrays, "seeds": np.array(seeds)}
        named |= {} if labels is None else {"labels": np.array(labels)}
        write_atomically(
            folder / "samples.npz",
            lambda file: np.savez(file, **named),  # type: ignore[arg-type]  # allow_pickle
        )
        for seed in seeds:
            _path(folder, seed).unlink()


def _iterate(folder: Path, seeds: Sequence[int]) -> Iterator[Tensor]:
    for seed in seeds:
        pixels = decode(_path(folder, seed).read_bytes(), size=None, channels=None)
        yield torch.from_numpy(pixels.copy())


def main() -> int:
    """Run `sample` with the options of sys.argv."""
    options = parse_options(sample, "sample")
    return run_command(lambda: sample(**options))
