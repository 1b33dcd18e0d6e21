"""How good samples are after a quarter of an hour of training, beside peers that train as long.

Everybody trains on Fashion-MNIST from nothing. The steps of all are timed in turn, so that the
machine is the same for all; then each takes as many as fit in `SECONDS`, and draws 1,000 images
with 50 evaluations each, which `fid` compares with 10,000 training images. Peers see images that
black pixels widen to 32x32, and their samples lose that edge again: all are judged at 28x28.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import yaml
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import Unet as LucidrainsUnet
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from ema_pytorch import EMA
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness import Row, environment_of, make_row, own_process, seconds_of
from benchmarks.peers import DiffusersStep
from benchmarks.quality import (
    EXPERIMENT,
    EXTRACTOR,
    SIZE,
    command,
    fashion_pixels,
    train,
    write_reference,
)
from benchmarks.training import OurStep
from ddpm_lightning import UNet
from ddpm_lightning.allocator import keep_freed_memory
from ddpm_lightning.images import to_uint8

FOLDER = Path("runs/time_to_quality")
"""Keeps what has been trained and judged: each is done once."""
SECONDS = 900.0
BATCH_SIZE, LEARNING_RATE = 32, 5e-4
"""Of the peers."""
NUM_SAMPLES, NUM_EVALUATIONS = 1000, 50
BATCH_OF_SAMPLES = 100
GUIDE, GUIDANCE, GUIDED_SAMPLER = "step=650.ckpt", 2, "dpmpp_2m"
"""How docs/fashion.md samples ours: half of the evaluations are those of an early checkpoint."""
EDGE = 2
"""Black pixels on each side of the images that peers see."""
NUM_TIMED, NUM_TURNS = 10, 6
"""Steps in a turn, and turns, of which the fastest counts: it was disturbed least."""
OURS, HARDER = "ddpm_lightning", "diffusers-our-network"
PEERS = ("diffusers", "denoising-diffusion-pytorch")


class WithSample(nn.Module):
    """Our network under the interface that diffusers' has."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        """Predict the noise in x [N, C, H, W] at t, int64 [N]."""
        return SimpleNamespace(sample=self.net(x, t))


class LucidrainsStep:
    """One training step of denoising-diffusion-pytorch's Trainer, from images in memory.

    Args:
        pixels: uint8 [N, H, W, 1].
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        net = LucidrainsUnet(dim=32, dim_mults=(1, 2, 2), channels=1)
        self._model = GaussianDiffusion(
            net, image_size=pixels.shape[1], sampling_timesteps=NUM_EVALUATIONS
        ).train()
        self._images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self._batches = self._draw()
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99)
        )
        self._ema = EMA(self._model, beta=0.995, update_every=10)

    def _draw(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self._images))
            for indices in order[: len(order) // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE):
                yield self._images[indices].float() / 255

    def __call__(self) -> None:
        """Take it."""
        self._model(next(self._batches)).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.update()

    def samples(self) -> dict[str, Tensor]:
        """Draw from the averaged weights by its own DDIM: uint8 [N, 1, H, W]."""
        model = self._ema.ema_model.eval()
        rest = range(NUM_SAMPLES, 0, -BATCH_OF_SAMPLES)
        batches = [model.sample(batch_size=min(BATCH_OF_SAMPLES, left)) for left in rest]
        return {"ddim": to_uint8(torch.cat(batches) * 2 - 1)}


class DiffusersRecipe:
    """One training step of diffusers' example, and its samples.

    Args:
        net: Its network, or ours under its interface.
        pixels: uint8 [N, H, W, 1].
        num_steps: Of the whole training.
    """

    def __init__(self, net: Any, pixels: NDArray[np.uint8], num_steps: int) -> None:
        self._shape = (1, *pixels.shape[1:3])
        self._step = DiffusersStep(
            net, pixels, BATCH_SIZE, lr=LEARNING_RATE, num_steps=num_steps, flip=False
        )

    def __call__(self) -> None:
        """Take it."""
        self._step()

    @torch.no_grad()
    def samples(self) -> dict[str, Tensor]:
        """Draw from the averaged weights by its own two samplers: uint8 [N, 1, H, W]."""
        net = self._step.averaged()
        found = {}
        for name, kind in (("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)):
            scheduler = kind(num_train_timesteps=1000)
            scheduler.set_timesteps(NUM_EVALUATIONS)
            x_t = torch.randn(NUM_SAMPLES, *self._shape)
            for t in tqdm(scheduler.timesteps, desc=f"sampling, {name}"):
                parts = x_t.chunk(-(-NUM_SAMPLES // BATCH_OF_SAMPLES))
                output = torch.cat([net(part, t.expand(len(part))).sample for part in parts])
                x_t = scheduler.step(output, t, x_t).prev_sample
            found[name] = to_uint8(x_t)
        return found


Peer = LucidrainsStep | DiffusersRecipe


def our_network() -> UNet:
    """Build the network of our experiment."""
    options = yaml.safe_load(EXPERIMENT.read_text())["model"]["net"]["init_args"]
    return UNet(**options)


def make_peer(name: str, num_steps: int = 1) -> Peer:
    """Make a peer as its documentation says, with these images and this batch size.

    Args:
        name: One of PEERS, or HARDER.
        num_steps: Of the whole training, where its learning rate depends on it.
    """
    torch.manual_seed(0)
    pixels = fashion_pixels()
    if name == HARDER:
        return DiffusersRecipe(WithSample(our_network()), pixels, num_steps)
    edges = [(0, 0), (EDGE, EDGE), (EDGE, EDGE), (0, 0)]
    widened = np.pad(pixels, edges)
    if name != "diffusers":
        return LucidrainsStep(widened)
    net = UNet2DModel(
        sample_size=SIZE + 2 * EDGE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return DiffusersRecipe(net, widened, num_steps)


def make_ours() -> OurStep:
    """Make our step with the experiment's network, batch and optimizer, as `fit` takes it."""
    keep_freed_memory()
    options = yaml.safe_load(EXPERIMENT.read_text())
    optimizer = options["model"]["optimizer"]
    return OurStep(
        our_network(),
        fashion_pixels()[:512],
        options["data"]["batch_size"],
        optimizer=partial(resolve_name(optimizer["class_path"]), **optimizer["init_args"]),
    )


def count_steps(folder: Path) -> dict[str, int]:
    """Time everybody's steps in turn, once, and say how many fit in `SECONDS`."""
    file = folder / "steps.json"
    if not file.exists():
        fastest = dict.fromkeys((OURS, *PEERS, HARDER), float("inf"))
        with ExitStack() as stack:
            repeat = {
                name: stack.enter_context(
                    own_process(make_ours) if name == OURS else own_process(make_peer, name)
                )
                for name in fastest
            }
            for turn in tqdm(range(NUM_TURNS + 1), desc="timing steps"):
                for name in fastest:
                    seconds = seconds_of(partial(repeat[name], NUM_TIMED)) / NUM_TIMED
                    if turn:  # the first takes what the first steps prepare
                        fastest[name] = min(fastest[name], seconds)
        found = {
            name: {"seconds_per_step": round(seconds, 4), "steps": int(SECONDS / seconds)}
            for name, seconds in fastest.items()
        }
        file.write_text(json.dumps(found, indent=2) + "\n")
    return {name: entry["steps"] for name, entry in json.loads(file.read_text()).items()}


def train_peer(name: str, num_steps: int, out: Path) -> None:
    """Train a peer and write OUT/NAME-SAMPLER.npz; for a process of its own."""
    peer = make_peer(name, num_steps)
    for _ in tqdm(range(num_steps), desc=f"training {name}", mininterval=10):
        peer()
    for sampler, images in peer.samples().items():
        inner = images[..., EDGE : EDGE + SIZE, EDGE : EDGE + SIZE] if name != HARDER else images
        np.savez_compressed(out / f"{name}-{sampler}.npz", inner.permute(0, 2, 3, 1).numpy())


def distances(folder: Path = FOLDER) -> dict[str, float]:
    """Train and judge everybody, as far as it has not been done.

    Returns:
        The distances by name; of a peer with two samplers, that of the better one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = count_steps(folder)
    for name in (*PEERS, HARDER):
        if not (folder / f"{name}-ddim.npz").exists():  # what each of them writes last
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(train_peer, name, steps[name], folder).result()
    run = folder / OURS
    train(run, f"--trainer.max_steps={steps[OURS]}")
    checkpoints = run / "checkpoints"
    command(
        "fid",
        str(checkpoints / "last.ckpt"),
        *map(str, sorted(folder.glob("*.npz"))),
        f"--reference={write_reference(folder / 'reference')}",
        f"--extractor={EXTRACTOR}",
        f"--num_images={NUM_SAMPLES}",
        f"--sampler={GUIDED_SAMPLER}",
        f"--num_steps={NUM_EVALUATIONS // 2}",
        f"--guide={checkpoints / GUIDE}",
        f"--guidance={GUIDANCE}",
        f"--out={folder / 'judged'}",
    )
    found: dict[str, float] = {}
    for row in json.loads((folder / "judged/sweep.json").read_text())["rows"]:
        distance = cast(float, row["metrics"][f"fd_{EXTRACTOR}"])
        name = Path(row["subject"]["path"]).stem.rpartition("-")[0] or OURS
        found[name] = min(distance, found.get(name, distance))
    return found


def _row(name: str, what: str, peers: tuple[str, ...], target: float) -> Row:
    where = environment_of(FOLDER)
    found = distances()
    peer = min(peers, key=found.__getitem__)
    text = (
        f"distance of {NUM_SAMPLES:,} Fashion-MNIST samples with {NUM_EVALUATIONS} evaluations "
        f"(ours guided), after {SECONDS / 60:g} minutes of training, against {what} ({peer})"
    )
    return make_row(name, text, "FD", [(found[OURS], found[peer])], "at most", target, where)


def time_to_quality(runs: int, budget: float) -> Row:
    """Compare our experiment with what users would take instead."""
    return _row("time-to-quality", "the better of two peers", PEERS, 0.25)


def time_to_quality_harder(runs: int, budget: float) -> Row:
    """Compare our experiment with the same network trained by diffusers' recipe."""
    return _row("time-to-quality-harder", "its recipe for our network", (HARDER,), 0.7)
