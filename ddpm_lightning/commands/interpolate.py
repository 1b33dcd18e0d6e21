"""`interpolate`: between two images, by way of their noised versions."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.options import parse_options, split_numbers
from ddpm_lightning.commands.pictures import PictureFile, Subject, open_subject, sampling_bar
from ddpm_lightning.commands.references import open_reference
from ddpm_lightning.commands.shell import run_command
from ddpm_lightning.commands.subjects import Checkpoint, without_remedy
from ddpm_lightning.data.decoding import BrokenImage, decode_split
from ddpm_lightning.data.image_folder import ImageFiles
from ddpm_lightning.data.items import SplitName
from ddpm_lightning.diffusion.interpolation import mix_noised
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels, to_float, to_uint8
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.randomness import NUM_SEEDS, NoiseStreams, derive_seed
from ddpm_lightning.samplers import Clip, SamplerName, Start, make_sampler

EIGHTHS = range(8, -1, -1)  # t of 1000, 875, ..., 0 in Fig. 9, where T is 1000
TENTHS = range(11)  # lambda of 0.1, ..., 0.9 in Fig. 9; 0 and 1 are its reconstructions


def interpolate(
    checkpoint: str,
    image_a: str,
    image_b: str,
    split: SplitName = "test",
    timesteps: str | None = None,
    sampler: SamplerName = "ddpm",
    num_steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: Clip | None = None,
    weights: Weights = "ema",
    seed: int = 0,
    out: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Interpolate between two images (Ho et al. 2020, Figs. 8 and 9).

    Both are noised by t steps, mixed by lambda, and the mixture is denoised. A row for each t, from
    coarse to fine: the images, their reconstructions at either end, and lambda from 0.1 to 0.9
    between. Without noising steps it is the pixels that are mixed. The noise of the images is the
    same for all lambda and t; on the way back each mixture has its own, as in the paper. With
    `--sampler ddim` there is none, and a row's images differ by lambda alone.

    Args:
        checkpoint: A .ckpt file of a run.
        image_a: An image file, brought to the model's shape as --data.source would bring it; or
            the number of an image of the run's data, from 0 on.
        image_b: The other one, likewise.
        split: Which of the run's images numbers are of: train, val or test (val, where the run's
            data has no test split).
        timesteps: Numbers of noising steps (the paper's t) from 0 to T, such as 500,250,0; the
            eighths of T when left out.
        sampler: As `sample` has it.
        num_steps: Timesteps to visit in a whole chain, of which the part below t is run; by default
            as `sample` has it.
        eta: Share of fresh noise for ddim, from 0 (deterministic, the default) to 1.
        spacing: Which timesteps those are, as `sample` has it.
        clip: What happens to the predicted x_0, as `sample` has it: static, dynamic or none.
        weights: The moving average, or the raw weights.
        seed: Of all noise.
        out: The picture, a .png; RUN/pictures/interpolate-step=N-WEIGHTS.png when left out. Its
            record is a .json beside it.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
    """
    if not 0 <= seed < NUM_SEEDS:
        raise InputError(f"--seed {seed}: must lie in 0..{NUM_SEEDS - 1}")
    chosen_sampler = make_sampler(sampler, num_steps, eta, spacing, clip)
    subject = open_subject(checkpoint, weights, chosen_sampler, accelerator)
    chosen = choose_timesteps(timesteps, subject.model.process.num_timesteps)
    images = load_images([image_a, image_b], split, subject.checkpoint)
    settings = {
        "images": [image_a, image_b],
        "images_sha256": [sha256(image.numpy().tobytes()).hexdigest() for image in images],
        "split": split,
        "timesteps": chosen,
        "seed": seed,
    }
    picture = PictureFile("interpolate", out, subject, settings)
    num_steps_of = [_num_steps(subject, num) for num in chosen]
    with sampling_bar(sum(num_steps_of)) as bar:
        rows = [decode_mixtures(subject, images, num, seed, bar) for num in chosen]
    # the images at either end, in each row
    cells = [torch.cat([images[:1], mixtures, images[1:]]) for mixtures in rows]
    middle = [f"λ = {tenth / 10:g}" for tenth in TENTHS[1:-1]]
    names = ["Source", "Rec.", *middle, "Rec.", "Source"]
    ends = [f"{split} image {word}" if word.isdecimal() else word for word in (image_a, image_b)]
    title = f"From {ends[0]} to {ends[1]}, noised by so many steps\n{subject.title()}"
    group = Group(names, torch.stack(cells))
    picture.write(labelled_grid(title, [f"{num} steps" for num in chosen], [group]))


def choose_timesteps(timesteps: str | None, num_timesteps: int) -> list[int]:
    """Choose the numbers of noising steps.

    Args:
        timesteps: Numbers divided by commas; the eighths of T, falling, when None.
        num_timesteps: T.

    Raises:
        InputError: One is outside the schedule.
    """
    if timesteps is None:
        return list(dict.fromkeys(num_timesteps * eighth // 8 for eighth in EIGHTHS))
    chosen = split_numbers("--timesteps", timesteps, least=0)
    if max(chosen) > num_timesteps:
        raise InputError(f"--timesteps {timesteps}: must lie in 0..{num_timesteps}, the schedule")
    return chosen


def load_images(words: Sequence[str], split: SplitName, checkpoint: Checkpoint) -> Tensor:
    """Load images from files, or from the data of a checkpoint's run.

    Args:
        words: Each a file, or the number of an image of the split.
        split: Which of the run's sets.
        checkpoint: The checkpoint; images are brought to its shape.

    Returns:
        uint8 [len(words), C, H, W].

    Raises:
        InputError: One is neither, or cannot be decoded.
    """
    numbers = [int(word) for word in words if word.isdecimal()]
    held = iter(_held_images(numbers, split, checkpoint)) if numbers else iter(())
    images = [
        next(held) if word.isdecimal() else _decode(Path(word).expanduser(), checkpoint)
        for word in words
    ]
    return torch.from_numpy(np.stack(images))


def decode_mixtures(
    subject: Subject, images: Tensor, num_noising_steps: int, seed: int, bar: "tqdm[Any]"
) -> Tensor:
    """Noise two images, mix them by lambda = 0, 0.1, ..., 1, and denoise the mixtures.

    Args:
        subject: The model and the sampler.
        images: uint8 [2, C, H, W].
        num_noising_steps: In [0, T].
        seed: Of all noise.
        bar: Advances with the steps.

    Returns:
        uint8 [11, C, H, W] on the CPU.
    """
    model = subject.model
    shares = torch.tensor([tenth / 10 for tenth in TENTHS], device=model.device)
    forward = NoiseStreams([derive_seed(seed, 0), derive_seed(seed, 1)], torch.device("cpu"))
    noise = forward.normal(images.shape[1:]).to(model.device)
    x_0 = to_float(images.to(model.device))
    x_t = mix_noised(model.process, x_0, noise, num_noising_steps, shares)
    if not num_noising_steps:
        return to_uint8(x_t).cpu()
    start = Start(x_t, num_noising_steps - 1)
    seeds = [derive_seed(seed, 2, number) for number in TENTHS]
    (mixtures,) = model.batches(seeds, subject.sampler, len(seeds), bar.update, start)
    return mixtures.cpu()


def _num_steps(subject: Subject, num_noising_steps: int) -> int:
    if not num_noising_steps:
        return 0
    part, _ = subject.sampler.below(subject.model.process, num_noising_steps - 1)
    return part.count_steps(subject.model.process)


def _held_images(numbers: Sequence[int], split: SplitName, checkpoint: Checkpoint) -> Pixels:
    try:
        data = open_reference(None, [checkpoint])
    except InputError as error:
        raise InputError(f"{without_remedy(error)}; give image files instead") from error
    images = {"train": data.train_images, "val": data.val_images, "test": data.test_images}[split]
    if images is None:
        raise InputError(f"--split {split}: the run has no such images; choose train")
    if max(numbers) >= len(images):
        raise InputError(
            f"image {max(numbers)}: the run has {len(images)} {split} images, from 0 to "
            f"{len(images) - 1}"
        )
    return images[np.array(numbers)]


def _decode(path: Path, checkpoint: Checkpoint) -> Pixels:
    if not path.is_file():
        raise InputError(
            f"{path}: no such image file (or give the number of an image of the run's --split)"
        )
    channels, *size = checkpoint.image_shape
    files = ImageFiles(path.parent, [path.name])
    (image,) = decode_split(files, (size[0], size[1]), channels)
    if isinstance(image, BrokenImage):
        raise InputError(f"{path}: cannot be decoded: {image}; give another image")
    return image


def main() -> int:
    """Run `interpolate` with the options of sys.argv."""
    usage = "CHECKPOINT IMAGE_A IMAGE_B [options]"
    options = parse_options(interpolate, "interpolate", usage)
    return run_command(lambda: interpolate(**options))
