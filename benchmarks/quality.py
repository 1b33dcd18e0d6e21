"""What few evaluations of the network cost in quality."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Row, make_row

RUN = Path("runs/fashion")
"""The run of experiments/fashion_mnist.yaml that docs/fashion.md describes."""
EXTRACTOR = "efficientnet-lite0"
NUM_IMAGES = 1000
ANCESTRAL, NUM_ANCESTRAL = "ddpm", 250
SAMPLERS = f"ddim,dpmpp_2m:5:10:20,dpmpp_2m_sde:10:20,{ANCESTRAL}:{NUM_ANCESTRAL}"
NUM_STEPS = "5,10,20,50"

Distances = dict[tuple[str, int], float]
"""By sampler and evaluations of the network."""


def sweep(run: Path) -> list[str]:
    """Give the command that judges few evaluations and many of a run's last checkpoint."""
    return [
        "fid",
        f"{run}/checkpoints/last.ckpt",
        *("--extractor", EXTRACTOR, "--num_images", str(NUM_IMAGES)),
        *("--sampler", SAMPLERS, "--num_steps", NUM_STEPS),
        *("--out", f"{run}/evaluations"),
    ]


def distances(run: Path) -> Distances:
    """Judge samples of a run's last checkpoint, and keep the distances in its folder.

    Each is taken once.
    """
    if not (run / "checkpoints/last.ckpt").exists():
        raise FileNotFoundError(f"{run}/checkpoints/last.ckpt: docs/fashion.md says how to train")
    subprocess.run([sys.executable, "-m", "ddpm_lightning", *sweep(run)], check=True)
    rows = json.loads((run / "evaluations/sweep.json").read_text())["rows"]
    return {
        (row["subject"]["sampler"], row["subject"]["nfe"]): row["metrics"][f"fd_{EXTRACTOR}"]
        for row in rows
    }


def best(found: Distances, num_evaluations: int) -> tuple[str, float]:
    """Give the sampler that is best with so many evaluations at most, and its distance."""
    few = [
        (distance, sampler) for (sampler, nfe), distance in found.items() if nfe <= num_evaluations
    ]
    distance, sampler = min(few)
    return sampler, distance


def few_step(num_evaluations: int, target: float) -> Row:
    """Compare samples of few evaluations with ancestral ones of the same checkpoint.

    In one round: the seeds settle a distance.
    """
    found = distances(RUN)
    sampler, distance = best(found, num_evaluations)
    what = (
        f"distance of {NUM_IMAGES:,} Fashion-MNIST samples, {num_evaluations} evaluations "
        f"({sampler}), against {NUM_ANCESTRAL} ancestral steps"
    )
    pair = (distance, found[ANCESTRAL, NUM_ANCESTRAL])
    return make_row(f"few-step-{num_evaluations}", what, "FD", [pair], "at most", target)


def few_step_10(runs: int, budget: float) -> Row:
    """Compare 10 evaluations."""
    return few_step(10, 1.15)


def few_step_20(runs: int, budget: float) -> Row:
    """Compare 20 evaluations."""
    return few_step(20, 1.05)
