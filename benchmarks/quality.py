"""What few evaluations of the network cost in quality: `python -m benchmarks.quality`."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row, environment_of, make_row

SOURCE = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts it."""
SIZE = 28  # pixels
EXPERIMENT = Path("experiments/fashion_mnist.yaml")
RUN = Path("runs/fashion")
"""The experiment's run that docs/fashion.md describes."""
EXTRACTOR = "efficientnet-lite0"
NUM_IMAGES, NUM_REFERENCE = 1000, 10_000
ANCESTRAL, NUM_ANCESTRAL = "ddpm", 250
SAMPLERS = f"ddim,dpmpp_2m:5:10:20,dpmpp_2m_sde:10:20,{ANCESTRAL}:{NUM_ANCESTRAL}"
NUM_STEPS = "5,10,20,50"

Distances = dict[tuple[str, int], float]
"""By sampler and evaluations of the network."""


def fashion_pixels() -> NDArray[np.uint8]:
    """Read the training images, uint8 [60,000, 28, 28, 1]."""
    with gzip.open(f"{SOURCE}/train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16)
    return pixels.reshape(-1, SIZE, SIZE, 1)


def write_reference(folder: Path) -> Path:
    """Write the first training images as an IDX file to a folder, and name that."""
    file = folder / "train-images-idx3-ubyte"
    if not file.exists():  # written anew, it would be other images to `fid`
        folder.mkdir(exist_ok=True)
        header = struct.pack(">4I", 0x0803, NUM_REFERENCE, SIZE, SIZE)
        file.write_bytes(header + fashion_pixels()[:NUM_REFERENCE].tobytes())
    return folder


def command(*arguments: str) -> None:
    """Run a command of this project, which must do well."""
    subprocess.run([sys.executable, "-m", "ddpm_lightning", *arguments], check=True)


def train(run: Path, *options: str) -> None:
    """Run `fit` with the experiment, or go on with what there is of the run."""
    source, folder = f"--data.source={SOURCE}", f"--run_dir={run}"
    command("fit", f"--config={EXPERIMENT}", source, folder, "--ckpt_path=auto", *options)


def sweep(run: Path) -> list[str]:
    """Give the command that judges few evaluations and many of a run's last checkpoint."""
    return [
        "fid",
        f"{run}/checkpoints/last.ckpt",
        *("--reference", f"{run}/reference", "--extractor", EXTRACTOR),
        *("--num_images", str(NUM_IMAGES)),
        *("--sampler", SAMPLERS, "--num_steps", NUM_STEPS),
        *("--out", f"{run}/evaluations"),
    ]


def distances(run: Path) -> tuple[Distances, dict[str, Any]]:
    """Judge samples of a run's last checkpoint, and keep the distances in its folder.

    Each is taken once. Where there is no run it is trained first, which takes a quarter of an hour.

    Returns:
        The distances, and the environment in which the first was taken.
    """
    if not (run / "checkpoints/last.ckpt").exists():
        train(run)
    where = environment_of(run)  # not before: `fit` wants an empty folder
    write_reference(run / "reference")
    command(*sweep(run))
    rows = json.loads((run / "evaluations/sweep.json").read_text())["rows"]
    found = {
        (row["subject"]["sampler"]["name"], row["subject"]["nfe"]): row["metrics"][
            f"fd_{EXTRACTOR}"
        ]
        for row in rows
    }
    return found, where


def best(found: Distances, num_evaluations: int) -> tuple[str, float]:
    """Give the sampler that is best with so many evaluations, and its distance."""
    distance, sampler = min(
        (distance, sampler) for (sampler, nfe), distance in found.items() if nfe == num_evaluations
    )
    return sampler, distance


def few_step(num_evaluations: int, target: float) -> Row:
    """Compare samples of few evaluations with ancestral ones of the same checkpoint.

    In one round: the seeds settle a distance.
    """
    found, where = distances(RUN)
    sampler, distance = best(found, num_evaluations)
    what = (
        f"distance of {NUM_IMAGES:,} Fashion-MNIST samples with {num_evaluations} evaluations "
        f"({sampler}), against {NUM_ANCESTRAL} ancestral steps"
    )
    pair = (distance, found[ANCESTRAL, NUM_ANCESTRAL])
    name = f"few-step-{num_evaluations}"
    return make_row(name, what, "FD", [pair], "at most", target, where)


def few_step_10(runs: int, budget: float) -> Row:
    """Compare 10 evaluations."""
    return few_step(10, 1.15)


def few_step_20(runs: int, budget: float) -> Row:
    """Compare 20 evaluations."""
    return few_step(20, 1.05)


if __name__ == "__main__":
    distances(RUN)
