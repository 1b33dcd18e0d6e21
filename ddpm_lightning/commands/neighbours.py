"""`neighbours`: samples beside the training images that are nearest to them."""

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.pictures import (
    PictureFile,
    open_subject,
    sampling_bar,
    split_batches,
)
from ddpm_lightning.commands.references import open_reference
from ddpm_lightning.commands.sample import parse_seeds, seeds_to_text
from ddpm_lightning.commands.shell import run_command
from ddpm_lightning.data.batches import Images
from ddpm_lightning.data.order import Indices
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import centre_crop
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.metrics.features import Extractor, make_extractor
from ddpm_lightning.metrics.neighbours import Nearest, NeighbourSearch
from ddpm_lightning.metrics.reference import describe_reference
from ddpm_lightning.samplers import Clip, SamplerName, make_sampler

NUM_IMAGES = 8


def neighbours(
    checkpoint: str,
    num_images: int | None = None,
    seeds: str | None = None,
    num_neighbours: int = 4,
    reference: str | None = None,
    num_train: int | None = None,
    extractor: str = "efficientnet-lite0",
    extractor_weights: str | None = None,
    crop: int | None = None,
    sampler: SamplerName = "ddpm",
    num_steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: Clip | None = None,
    weights: Weights = "ema",
    out: str | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
) -> None:
    """Show samples beside the nearest training images (Ho et al. 2020, Figs. 12 and 15).

    A row for each sample: it and the training images nearest to it by their pixels, then the same
    in an extractor's features. Distances stand below: root mean square differences in grey levels,
    and Euclidean ones of features.

    Args:
        checkpoint: A .ckpt file of a run.
        num_images: Samples from seeds 0, 1, ...; 8 when neither this nor seeds is given.
        seeds: The seeds instead, such as 0-7 or 3,7,100-120.
        num_neighbours: Training images beside each sample.
        reference: A data set as --data.source takes it, whose training images are searched, at the
            model's size and channels; by default what the checkpoint's run trains on.
        num_train: Search only so many of them, spread evenly, since features take their time; all
            when left out.
        extractor: As `fid` has it: inception (the paper's), efficientnet-lite0, another of
            torch-fidelity's, or the class path of a torch.nn.Module.
        extractor_weights: Inception's weights file, where torch.hub's cache does not have it.
        crop: Compare only so many pixels square at the centre; whole images when left out. The
            paper takes 100 for faces of 256.
        sampler: As `sample` has it.
        num_steps: Timesteps to visit, by default as `sample` has it.
        eta: Share of fresh noise for ddim, from 0 (deterministic, the default) to 1.
        spacing: Which timesteps those are, as `sample` has it.
        clip: What happens to the predicted x_0, as `sample` has it: static, dynamic or none.
        weights: The moving average, or the raw weights.
        out: The picture, a .png; RUN/pictures/neighbours-step=N-WEIGHTS.png when left out. Its
            record, a .json beside it, names the training images by their numbers.
        batch_size: Images at a time.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
    """
    wanted = parse_seeds(seeds, num_images, NUM_IMAGES)
    num_batches = len(split_batches(wanted, batch_size))
    chosen_sampler = make_sampler(sampler, num_steps, eta, spacing, clip)
    subject = open_subject(checkpoint, weights, chosen_sampler, accelerator)
    size = min(subject.checkpoint.image_shape[1:])
    if crop is not None and not 1 <= crop <= size:
        raise InputError(f"--crop {crop}: must lie in 1..{size}, the images' size")
    chosen = make_extractor(extractor, extractor_weights)
    chosen.module.to(subject.model.device)
    data = open_reference(reference, [subject.checkpoint])
    images = data.train_images
    if num_train is not None and num_train < 1:
        raise InputError(f"--num_train must be at least 1, got {num_train}")
    searched = images.spread(num_train or len(images))
    if not 1 <= num_neighbours <= len(searched):
        raise InputError(
            f"--num_neighbours {num_neighbours}: must lie in 1..{len(searched)}, the images of "
            f"{data.source} that are searched"
        )
    settings = {
        "seeds": seeds_to_text(wanted),
        "num_neighbours": num_neighbours,
        "num_train": len(searched),
        **describe_reference(images, data.source, chosen),
        "crop": crop,
        "batch_size": batch_size,
        **subject.describe_classes(),
    }
    picture = PictureFile("neighbours", out, subject, settings)
    with sampling_bar(num_batches * subject.num_steps) as bar:
        labels = subject.model.labels_of(wanted)
        drawn = subject.model.batches(
            wanted, subject.sampler, batch_size, bar.update, labels=labels
        )
        samples = torch.cat([part.cpu() for part in drawn])
    found = find_neighbours(samples, images, searched, chosen, num_neighbours, crop, batch_size)
    groups = [
        _group(f"nearest by {space}", samples, images, nearest) for space, nearest in found.items()
    ]
    area = "" if crop is None else f", by {crop} x {crop} pixels at the centre"
    title = (
        f"Samples and the nearest of {len(searched):,} images of {data.source}{area}; below, root "
        f"mean square differences in grey levels and distances of features\n{subject.title()}"
    )
    results = {
        space: {"indices": nearest.indices.tolist(), "distances": nearest.distances.tolist()}
        for space, nearest in found.items()
    }
    rows = [f"seed {seed}" for seed in wanted]
    picture.write(labelled_grid(title, rows, groups), {"neighbours": results})


def find_neighbours(
    samples: Tensor,
    images: Images,
    searched: Indices,
    extractor: Extractor,
    num_neighbours: int,
    crop: int | None,
    batch_size: int,
) -> dict[str, Nearest]:
    """Find the images that are nearest to each sample.

    Args:
        samples: uint8 [N, C, H, W].
        images: Images of the same shape.
        searched: Which of them to look at, int64 [M].
        extractor: Of the features.
        num_neighbours: How many for each sample.
        crop: Compare only so many pixels square at the centre.
        batch_size: Images at a time.

    Returns:
        For "pixels", in root mean square grey levels, and for the extractor's name; indices are
        those of `images`.
    """
    device = extractor.device

    def prepare(pixels: Tensor) -> Tensor:
        return pixels.to(device) if crop is None else centre_crop(pixels, crop).to(device)

    def features(pixels: Tensor) -> Tensor:
        return torch.cat([extractor(part).features for part in torch.split(pixels, batch_size)])

    queries = prepare(samples)
    by_pixels = NeighbourSearch(queries.flatten(1), num_neighbours)
    by_features = NeighbourSearch(features(queries), num_neighbours)
    with tqdm(total=len(searched), desc="searching", unit="image", **bar_options()) as bar:
        for start in range(0, len(searched), batch_size):
            rows = prepare(torch.from_numpy(images[searched[start : start + batch_size]]))
            by_pixels.add(rows.flatten(1))
            by_features.add(features(rows))
            bar.update(len(rows))
    found = {
        "pixels": by_pixels.finish().in_grey_levels(queries[0].numel()),
        extractor.name: by_features.finish(),
    }
    places = torch.from_numpy(searched)
    return {
        space: nearest._replace(indices=places[nearest.indices.cpu()])
        for space, nearest in found.items()
    }


def _group(heading: str, samples: Tensor, images: Images, nearest: Nearest) -> Group:
    """Lay each sample beside its neighbours, whose distances stand below."""
    indices = nearest.indices
    pixels = torch.from_numpy(images[indices.flatten().numpy()])
    pixels = pixels.reshape(*indices.shape, *images.image_shape)
    labels = [["", *(f"{distance:.3g}" for distance in row)] for row in nearest.distances.tolist()]
    names = ["sample", *map(str, range(1, indices.shape[1] + 1))]
    return Group(names, torch.cat([samples[:, None], pixels], dim=1), heading, labels)


def main() -> int:
    """Run `neighbours` with the options of sys.argv."""
    options = parse_options(neighbours, "neighbours")
    return run_command(lambda: neighbours(**options))
