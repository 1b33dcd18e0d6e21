"""`reconstruct`: images to noise and back, along DDIM's chain without fresh noise."""

from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.shell import announce, new_file, run_command
from ddpm_lightning.commands.subjects import check_shape, without_remedy
from ddpm_lightning.commands.trainer import choose_device
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.denoiser import finished_images
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import make_grid, to_float, write_png
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import DDIMSampler
from ddpm_lightning.samplers.heun import MAX_RATIO

COLUMNS = 8  # four pairs
BATCH_SIZE = 64


def reconstruct(
    checkpoint: str,
    images: str,
    num_steps: int | None = None,
    spacing: str = DDIMSampler.spacing,
    num_images: int = 16,
    weights: Weights = "ema",
    out: str = "reconstruction.png",
    accelerator: str = "auto",
) -> None:
    """Encode images to noise and decode it again (DDIM inversion).

    Writes a picture in which each image stands beside its reconstruction, and prints how far they
    are apart on average. Predictions are not clipped, for that cannot be inverted.

    Args:
        checkpoint: A .ckpt file of a run.
        images: A data set as --data.source takes it; its first training images are taken, at the
            checkpoint's size and channels.
        num_steps: Timesteps to visit, on the way up and again down; 50 by default. More are nearer.
            The highest, where next to nothing is left of an image, are left out.
        spacing: Which timesteps those are, as `sample` has it.
        num_images: How many images.
        weights: The moving average, or the raw weights.
        out: The PNG to write.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
    """
    path = new_file(out)
    sampler = DDIMSampler(num_steps, spacing=spacing, clip="none")
    model = DDPM.from_checkpoint(checkpoint, weights)
    process = without_pure_noise(sampler.respace(model.process))
    sampler = DDIMSampler(process.num_timesteps, clip="none")
    originals = _read(Path(checkpoint), model, images, num_images)
    device = choose_device(accelerator)
    model.to(device)
    process.to(device)
    starts = range(0, len(originals), BATCH_SIZE)
    parts = (originals[start : start + BATCH_SIZE] for start in starts)
    decoded = torch.cat([_there_and_back(model, process, sampler, part) for part in parts])
    error = float((decoded.int() - originals.int()).abs().double().mean())
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = torch.stack([originals, decoded], dim=1).flatten(0, 1)
    write_png(path, make_grid(pairs, num_columns=COLUMNS))
    announce(
        f"mean error: {error:.3f} of 255 levels, with {process.num_timesteps} steps each way\n"
        f"images: {out}"
    )


def without_pure_noise(process: Process) -> Process:
    """Leave out the highest timesteps, at which next to nothing is left of an image.

    There a predicted x_0 is the small difference of large numbers, times up to 20,291 in the cosine
    schedule: what is lost on the way up could not be found again. The linear schedule has none.
    """
    ratios = (1 / process.alphas_cumprod - 1).sqrt()  # of noise to signal
    return process.respace(torch.arange(max(1, int((ratios <= MAX_RATIO).sum()))))


@torch.no_grad()
def _there_and_back(model: DDPM, process: Process, sampler: DDIMSampler, images: Tensor) -> Tensor:
    """Encode and decode uint8 [N, C, H, W]; the result is on the CPU."""
    x_0 = to_float(images.to(model.device))
    # not `*_, last`: that keeps all the steps
    latent = deque(sampler.encode(model, process, x_0), maxlen=1).pop()
    last = deque(sampler(model, process, lambda: latent), maxlen=1).pop()
    return finished_images(last).cpu()


def _read(checkpoint: Path, model: DDPM, source: str, num_images: int) -> Tensor:
    """Read the first images, uint8 [num_images, C, H, W]."""
    if model.image_shape is None:
        raise InputError(f"{checkpoint}: does not say what shape its images have")
    channels, height, width = model.image_shape
    try:
        data = ImageDataModule(source, (height, width), 3 if channels == 3 else 1, val_fraction=0)
        found = data.train_images
    except InputError as error:
        raise InputError(f"{source}: {without_remedy(error)}") from error
    check_shape(checkpoint, (channels, height, width), source, found.image_shape)
    if not 1 <= num_images <= len(found):
        raise InputError(f"--num_images {num_images}: {source} has 1 to {len(found)} of them")
    return torch.from_numpy(found[np.arange(num_images)])


def main() -> int:
    """Run `reconstruct` with the options of sys.argv."""
    options = parse_options(reconstruct, "reconstruct", usage="CHECKPOINT IMAGES [options]")
    return run_command(lambda: reconstruct(**options))
