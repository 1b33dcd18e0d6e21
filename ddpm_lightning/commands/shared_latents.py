"""`shared-latents`: samples that share the noisy image that they come from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.options import parse_options, split_numbers
from ddpm_lightning.commands.pictures import (
    PictureFile,
    Subject,
    open_subject,
    sampling_bar,
    split_batches,
)
from ddpm_lightning.commands.sample import parse_seeds, seeds_to_text
from ddpm_lightning.commands.shell import run_command
from ddpm_lightning.denoiser import finished_images
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_uint8
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.randomness import NoiseStreams, derive_seed
from ddpm_lightning.samplers import Start, make_sampler

NUM_CHAINS = 4
QUARTERS = (4, 3, 2, 1)  # t of 1000, 750, 500 and 250 in Fig. 7, where T is 1000


def shared_latents(
    checkpoint: str,
    num_images: int | None = None,
    seeds: str | None = None,
    split: str | None = None,
    num_samples: int = 3,
    num_steps: int | None = None,
    weights: Weights = "ema",
    out: str | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
) -> None:
    """Show what is settled when in ancestral sampling (Ho et al. 2020, Fig. 7).

    A row for each chain: its own sample (the image that `sample` gives), then for each t the state
    x_t and samples that go on from it, each with fresh noise. What they have in common was settled
    in x_t. Each sample's noise is a function of the chain's seed, t and the sample's number.

    Args:
        checkpoint: A .ckpt file of a run.
        num_images: Chains from seeds 0, 1, ...; 4 when neither this nor seeds is given.
        seeds: The chains' seeds instead, such as 0-7 or 3,7,100-120.
        split: Where to split the chain, as numbers of noising steps (the paper's t) from 1 to T,
            such as 1000,750; the quarters of T when left out.
        num_samples: Samples that go on from each x_t.
        num_steps: Timesteps to visit in a whole chain; all when left out. With fewer, chains are
            split at the visited ones nearest to those asked for.
        weights: The moving average, or the raw weights.
        out: The picture, a .png; RUN/pictures/shared-latents-step=N-WEIGHTS.png when left out. Its
            record is a .json beside it.
        batch_size: Images at a time.
        accelerator: As Lightning's Trainer has it: auto, cpu, gpu, ...
    """
    wanted = parse_seeds(seeds, num_images, NUM_CHAINS)
    batches = split_batches(wanted, batch_size)
    if num_samples < 1:
        raise InputError(f"--num_samples must be at least 1, got {num_samples}")
    subject = open_subject(checkpoint, weights, make_sampler("ddpm", num_steps), accelerator)
    visited = subject.sampler.respace(subject.model.process).timesteps
    timesteps = choose_timesteps(split, visited, subject.model.process.num_timesteps)
    settings = {
        "seeds": seeds_to_text(wanted),
        "split": [t + 1 for t in timesteps],
        "num_samples": num_samples,
        "batch_size": batch_size,
        **subject.describe_classes(),
    }
    picture = PictureFile("shared-latents", out, subject, settings)
    num_left = [len(visited[visited <= t]) for t in timesteps]
    num_batches = -(-len(wanted) * num_samples // batch_size)  # of each split
    with sampling_bar(len(batches) * len(visited) + num_batches * sum(num_left)) as bar:
        chains = [run_chains(subject, batch, timesteps, bar) for batch in batches]
        whole, states = (torch.cat(parts) for parts in zip(*chains, strict=True))
        groups = [Group(["sample"], whole[:, None])]
        for t, x_t in zip(timesteps, states.unbind(dim=1), strict=True):
            samples = go_on(subject, x_t, t, wanted, num_samples, batch_size, bar)
            images = torch.cat([to_uint8(x_t).cpu()[:, None], samples], dim=1)
            names = ["x_t", *map(str, range(1, num_samples + 1))]
            groups.append(Group(names, images, f"shared: x_t of {t + 1} noising steps"))
    title = f"Samples that go on from one x_t with fresh noise\n{subject.title()}"
    picture.write(labelled_grid(title, [f"seed {seed}" for seed in wanted], groups))


def choose_timesteps(split: str | None, visited: Tensor, num_timesteps: int) -> list[int]:
    """Choose the zero-based t at which chains are split, among those that they visit.

    Args:
        split: Numbers of noising steps, divided by commas; the quarters of T when None.
        visited: The chain's timesteps, int64 [S], increasing.
        num_timesteps: T.

    Raises:
        InputError: One is outside the schedule, or two are nearest to one visited timestep.
    """
    if split is None:
        asked = [max(1, num_timesteps * quarters // 4) for quarters in QUARTERS]
    else:
        asked = split_numbers("--split", split)
    if max(asked) > num_timesteps:
        raise InputError(f"--split {split}: must lie in 1..{num_timesteps}, the schedule")
    nearest = [int(visited[(visited - (t - 1)).abs().argmin()]) for t in asked]
    distinct = list(dict.fromkeys(nearest))
    if split is not None and len(distinct) < len(nearest):
        raise InputError(
            f"--split {split}: two of them are nearest to one of the {len(visited)} steps that "
            "are taken; give a larger --num_steps"
        )
    return distinct


def run_chains(
    subject: Subject, seeds: Sequence[int], timesteps: Sequence[int], bar: "tqdm[Any]"
) -> tuple[Tensor, Tensor]:
    """Run whole chains.

    Returns:
        The samples, uint8 [N, C, H, W] on the CPU, and x_t at each of K timesteps,
        [N, K, C, H, W].
    """
    visited = subject.sampler.respace(subject.model.process).timesteps.tolist()
    # x_T is a seed's first draw
    noise = NoiseStreams(seeds, torch.device("cpu")).normal(subject.checkpoint.image_shape)
    states = {visited[-1]: noise.to(subject.model.device)}
    last = None
    chain = subject.model.denoise(seeds, subject.sampler, labels=subject.model.labels_of(seeds))
    for t_next, last in zip([*visited[-2::-1], None], chain, strict=True):
        bar.update()
        if t_next in timesteps:
            states[t_next] = last.x_prev
    assert last is not None
    return finished_images(last).cpu(), torch.stack([states[t] for t in timesteps], dim=1)


def go_on(
    subject: Subject,
    x_t: Tensor,
    t: int,
    seeds: Sequence[int],
    num_samples: int,
    batch_size: int,
    bar: "tqdm[Any]",
) -> Tensor:
    """Give samples of p(x_0 | x_t), several for each chain.

    Args:
        subject: The model and the sampler.
        x_t: The chains' states, float [N, C, H, W].
        t: Zero-based.
        seeds: The chains'.
        num_samples: For each chain.
        batch_size: Images at a time.
        bar: Advances with the steps.

    Returns:
        uint8 [N, num_samples, C, H, W] on the CPU.
    """
    fresh = [derive_seed(seed, t, number) for seed in seeds for number in range(num_samples)]
    start = Start(x_t.repeat_interleave(num_samples, dim=0), t)
    # the chain's class, not that of the derived seed
    labels = subject.model.labels_of([seed for seed in seeds for _ in range(num_samples)])
    images = subject.model.batches(fresh, subject.sampler, batch_size, bar.update, start, labels)
    samples = torch.cat([part.cpu() for part in images])
    return samples.reshape(len(seeds), num_samples, *x_t.shape[1:])


def main() -> int:
    """Run `shared-latents` with the options of sys.argv."""
    options = parse_options(shared_latents, "shared-latents")
    return run_command(lambda: shared_latents(**options))
