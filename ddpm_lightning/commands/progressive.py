"""`progressive`: what the model takes the image for at each step on the way to it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.options import parse_options
from ddpm_lightning.commands.pictures import (
    PictureFile,
    Subject,
    open_subject,
    sampling_bar,
    split_batches,
)
from ddpm_lightning.commands.quality import Quality, describe, quality_files
from ddpm_lightning.commands.sample import parse_seeds, seeds_to_text
from ddpm_lightning.commands.shell import announce, run_command
from ddpm_lightning.denoiser import finished_images
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_uint8
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.samplers import Clip, SamplerName, make_sampler

NUM_IMAGES = 8
NUM_COLUMNS = 10


def progressive(
    checkpoint: str,
    num_images: int | None = None,
    seeds: str | None = None,
    num_columns: int | None = None,
    sampler: SamplerName = "ddpm",
    num_steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: Clip | None = None,
    weights: Weights = "ema",
    num_judged: int | None = None,
    extractor: str = "efficientnet-lite0",
    extractor_weights: str | None = None,
    reference: str | None = None,
    out: str | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
) -> None:
    """Show how samples come about (Ho et al. 2020, Figs. 6, 10 and 14).

    A row for each seed: the x_0 that the network predicts at some of the chain's steps, labelled by
    the zero-based t, and last the sample, which is the image that `sample` gives.

    Args:
        checkpoint: A .ckpt file of a run.
        num_images: Rows from seeds 0, 1, ...; 8 when neither this nor seeds is given.
        seeds: The seeds instead, such as 0-7 or 3,7,100-120.
        num_columns: The chain's steps are divided into so many equal parts, of each of which the
            last prediction is shown; 10, or all steps where there are fewer. The paper has 20.
        sampler: As `sample` has it.
        num_steps: Timesteps to visit, by default as `sample` has it.
        eta: Share of fresh noise for ddim, from 0 (deterministic, the default) to 1.
        spacing: Which timesteps those are, as `sample` has it.
        clip: What happens to the predicted x_0, as `sample` has it: static, dynamic or none.
        weights: The moving average, or the raw weights.
        num_judged: Judge the predictions of so many seeds 0, 1, ... at each of the steps shown, by
            their Frechet distance and, where the extractor has classes, the Inception Score: the
            paper's Fig. 10, a table and a chart beside the picture (-quality.csv, -quality.png).
        extractor: Whose features are compared, as `fid` has it: inception (the paper's),
            efficientnet-lite0, another of torch-fidelity's, or the class path of a torch.nn.Module.
        extractor_weights: Inception's weights file, where torch.hub's cache does not have it.
        reference: What is compared with, as `fid` has it; by default what the checkpoint's run
            trains on.
        out: The picture, a .png; RUN/pictures/progressive-step=N-WEIGHTS.png when left out. Its
            record is a .json beside it.
        batch_size: Images at a time.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
    """
    wanted = parse_seeds(seeds, num_images, NUM_IMAGES)
    batches = split_batches(wanted, batch_size)
    chosen_sampler = make_sampler(sampler, num_steps, eta, spacing, clip)
    subject = open_subject(checkpoint, weights, chosen_sampler, accelerator)
    shown = choose_steps(subject.num_steps, num_columns)
    settings: dict[str, Any] = {
        "seeds": seeds_to_text(wanted),
        "num_columns": len(shown),
        "num_judged": num_judged,
        "batch_size": batch_size,
        **subject.describe_classes(),
    }
    quality = None
    if num_judged is not None:
        quality = Quality(subject, num_judged, extractor, extractor_weights, reference, batch_size)
        settings |= quality.settings
    beside = quality_files if quality is not None else lambda path: ()
    picture = PictureFile("progressive", out, subject, settings, beside)
    names, images = draw_rows(subject, batches, shown)
    group = Group(names, images)
    title = f"Predicted x_0 along the chain, and the sample\n{subject.title()}"
    grid = labelled_grid(title, [f"seed {seed}" for seed in wanted], [group])
    if quality is None:
        picture.write(grid)
        return
    judged, warnings = quality.judge(shown)
    picture.write(grid, describe(judged, warnings))
    title = f"Predicted x_0 along the chain\n{subject.title()}"
    announce(quality.write(picture.path, judged, title))
    announce("quality: {}, {}".format(*quality_files(picture.path)))


def draw_rows(
    subject: Subject, batches: Sequence[Sequence[int]], shown: set[int]
) -> tuple[list[str], Tensor]:
    """Run the chains, and keep the predictions at some steps.

    Returns:
        What each step is called, K texts, and the images, uint8 [N, K, C, H, W].
    """
    rows = []
    timesteps: list[int] = []
    with sampling_bar(len(batches) * subject.num_steps) as bar:
        for batch in batches:
            timesteps, columns, last = [], [], None
            labels = subject.model.labels_of(batch)
            chain = subject.model.denoise(batch, subject.sampler, labels=labels)
            for index, last in enumerate(chain):
                bar.update()
                if index in shown:
                    timesteps.append(last.t)
                    columns.append(to_uint8(last.pred_x_0).cpu())
            assert last is not None
            columns[-1] = finished_images(last).cpu()
            rows.append(torch.stack(columns, dim=1))
    return [*(f"t = {t}" for t in timesteps[:-1]), "sample"], torch.cat(rows)


def choose_steps(num_steps: int, num_columns: int | None) -> set[int]:
    """Choose which of a chain's steps to show, counted from the noise; the last is among them.

    Raises:
        InputError: There are not so many.
    """
    if num_columns is None:
        num_columns = min(NUM_COLUMNS, num_steps)
    if not 1 <= num_columns <= num_steps:
        raise InputError(f"--num_columns {num_columns}: must lie in 1..{num_steps}, the steps")
    # part j begins at the step with j * num_steps / num_columns others after it, rounded up
    return {num_steps - 1 + (-j * num_steps) // num_columns for j in range(num_columns)}


def main() -> int:
    """Run `progressive` with the options of sys.argv."""
    options = parse_options(progressive, "progressive")
    return run_command(lambda: progressive(**options))
