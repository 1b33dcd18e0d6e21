"""What few evaluations of the network cost in quality."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Row, make_row

RUN = Path("runs/fashion")
"""The run of experiments/fashion_mnist.yaml that docs/fashion.md describes."""
EXTRACTOR = "efficientnet-lite0"
SAMPLER, FEW = "dpmpp_2m", (10, 20)
NUM_ANCESTRAL = 250


def distances(run: Path, num_images: int, ancestral: int = NUM_ANCESTRAL) -> dict[int, float]:
    """Judge samples of few evaluations and ancestral ones of a run's last checkpoint.

    Args:
        run: Its folder, in which the distances are kept: each is taken once.
        num_images: Samples of each.
        ancestral: Steps of the ancestral sampler.

    Returns:
        The distances to the training images, by evaluations.
    """
    checkpoint, out = run / "checkpoints/last.ckpt", run / "few_step"
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: docs/fashion.md says how it is trained")
    samplers = ",".join([":".join(map(str, (SAMPLER, *FEW))), f"ddpm:{ancestral}"])
    command = ["fid", str(checkpoint), "--extractor", EXTRACTOR, "--num_images", str(num_images)]
    command += ["--sampler", samplers, "--out", str(out)]
    subprocess.run([sys.executable, "-m", "ddpm_lightning", *command], check=True)
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    return {row["subject"]["nfe"]: row["metrics"][f"fd_{EXTRACTOR}"] for row in rows}


def few_step(num_evaluations: int, target: float) -> Row:
    """Compare samples of few evaluations with ancestral ones of the same checkpoint.

    In one round: the seeds settle a distance.
    """
    num_images = 1000
    found = distances(RUN, num_images)
    what = (
        f"distance of {num_images:,} Fashion-MNIST samples, {SAMPLER} with {num_evaluations} "
        f"evaluations, against {NUM_ANCESTRAL} ancestral steps"
    )
    pair = (found[num_evaluations], found[NUM_ANCESTRAL])
    return make_row(f"few-step-{num_evaluations}", what, "FD", [pair], "at most", target)


def few_step_10(runs: int, budget: float) -> Row:
    """Compare 10 evaluations."""
    return few_step(10, 1.15)


def few_step_20(runs: int, budget: float) -> Row:
    """Compare 20 evaluations."""
    return few_step(20, 1.05)
