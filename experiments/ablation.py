"""Ho et al. 2020, Table 2, at the size of digits: `python -m experiments.ablation` (make ablation).

Trains each of the six rows on the default experiment's digits with the paper's linear schedule, in
a quarter of its timesteps, by the overlays that the CIFAR-10 rows use, judges it, and prints the
table beside the paper's. Interrupted, the same command goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

OVERLAYS = Path(__file__).parent / "cifar10"
RUNS = Path("runs/ablation")
# A quarter of the paper's timesteps, with four times its betas: all of them can be sampled in the
# time that there is, and a learned variance belongs to the steps that it was trained on.
SCHEDULE = {"schedule": "linear", "num_timesteps": "250", "beta_start": "4e-4", "beta_end": "0.08"}
# only in the features of Inception are they called FID and KID
FD, KD, BITS = "fd_efficientnet-lite0", "kd_efficientnet-lite0", "bits_per_dim"


@dataclass(frozen=True)
class Row:
    """A row of the paper's Table 2; `fid` is None where the paper could not train it stably."""

    name: str
    predicts: str
    objective: str
    fid: float | None

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return RUNS / self.name

    def options(self) -> list[str]:
        """Give what `fit` needs to know of it."""
        overlay = OVERLAYS / f"{self.name}.yaml"  # the last row is what the overlays differ from
        changes = ["--config", str(overlay)] if overlay.exists() else []
        return ["--model.prediction=noise", *changes]


ROWS = (
    Row("mu_bound_learned", "mean", "L, learned diagonal variance", 23.69),
    Row("mu_bound_fixed", "mean", "L, fixed variance", 13.22),
    Row("mu_mse", "mean", "squared error", None),
    Row("noise_bound_learned", "noise", "L, learned diagonal variance", None),
    Row("noise_bound_fixed", "noise", "L, fixed variance", 13.51),
    Row("noise_simple", "noise", "squared error (L_simple)", 3.17),
)


def train(row: Row, num_steps: int) -> Path | None:
    """Train a row, or go on with it.

    Returns:
        Its last checkpoint; None if its loss or gradient was not finite.
    """
    checkpoint = row.run / "checkpoints" / f"step={num_steps}.ckpt"
    diverged = row.run / "nonfinite.json"
    if not (checkpoint.exists() or diverged.exists()):
        arguments = [*row.options(), "--fid.every_n_steps", "0"]
        arguments += [f"--model.{key}={value}" for key, value in SCHEDULE.items()]
        arguments += ["--trainer.max_steps", str(num_steps), "--trainer.devices", "1"]
        arguments += ["--run_dir", str(row.run), "--ckpt_path", "auto"]
        start = time.perf_counter()
        call("fit", *arguments, may_fail=diverged)
        print(
            f"\ntrained: {row.name}, {(time.perf_counter() - start) / 60:.1f} minutes", flush=True
        )
    return None if diverged.exists() else checkpoint


def judge(row: Row, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Judge a row's samples and its bound, or read what was found before.

    Returns:
        The metrics, by name.
    """
    metrics: dict[str, Any] = {}
    judged, bound = row.run / "judged", row.run / "likelihood"
    where = [str(checkpoint), "--accelerator", "cpu"]
    if not (judged / "record.json").exists():
        samples = ["--sampler", "ddpm", "--num_images", str(options.num_images)]
        call(
            "fid",
            *where,
            "--extractor",
            "efficientnet-lite0",
            "--metrics",
            "fd,kid",
            *samples,
            "--out",
            str(judged),
        )
    if not (bound / "record.json").exists():
        images = ["--split", "test", "--num_images", str(options.num_likelihood_images)]
        call("likelihood", *where, *images, "--out", str(bound))
    for folder in (judged, bound):
        metrics |= json.loads((folder / "record.json").read_text())["metrics"]
    return metrics


def call(*arguments: str, may_fail: Path | None = None) -> None:
    """Run a command of the package; one that fails ends this one, unless it left a certain file."""
    print("\n$ python -m ddpm_lightning", *arguments, flush=True)
    status = subprocess.run([sys.executable, "-m", "ddpm_lightning", *arguments]).returncode
    if status and not (may_fail is not None and may_fail.exists()):
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(status)


def compare_order(found: dict[str, float]) -> Iterator[tuple[str, str, bool]]:
    """Compare all pairs of rows of which the paper says which is better.

    Args:
        found: Our distances by the row's name; infinity where training diverged.

    Yields:
        The row that is better in the paper, the worse one, and whether ours are in this order.
    """
    for first, second in combinations(ROWS, 2):
        if first.fid == second.fid:  # both without a number
            continue
        better, worse = sorted((first, second), key=lambda row: row.fid or float("inf"))
        yield better.name, worse.name, found[better.name] < found[worse.name]


def make_table(results: dict[str, dict[str, Any] | None], options: argparse.Namespace) -> str:
    """Lay out the results, None for a row that diverged, in Markdown."""
    lines = [
        f"| | predicts | objective | {FD} | {KD} | bits/dim | paper's FID |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {}
    for number, row in enumerate(ROWS, start=1):
        metrics = results[row.name]
        ours = ["diverged", "–", "–"]
        if metrics is not None:
            ours = [f"{metrics[FD]:.2f}", f"{metrics[KD]:.4f}", f"{metrics[BITS]:.3f}"]
        found[row.name] = float("inf") if metrics is None else metrics[FD]
        paper = "–" if row.fid is None else f"{row.fid:.2f}"
        lines.append(
            f"| {number} | {row.predicts} | {row.objective} | {' | '.join([*ours, paper])} |"
        )
    told = (
        f"Digits of 8x8 pixels, {options.num_steps:,} steps of training a row; "
        f"{options.num_images:,} samples, and the bound of {options.num_likelihood_images} test "
        f"images, over all {SCHEDULE['num_timesteps']} timesteps. "
        "The paper: CIFAR-10, 800,000 steps; – is what it could not train stably."
    )
    return "\n".join([*lines, "", told, "", _tell_order(found)])


def _tell_order(found: dict[str, float]) -> str:
    numbers = {row.name: number for number, row in enumerate(ROWS, start=1)}
    pairs = list(compare_order(found))
    wrong = [
        f"{numbers[better]} before {numbers[worse]}" for better, worse, as_in in pairs if not as_in
    ]
    return (
        f"Of the {len(pairs)} pairs of rows that the paper puts in an order (– being the last), "
        f"{len(pairs) - len(wrong)} come out in that order"
        + (f"; not so: {', '.join(wrong)}." if wrong else ".")
    )


def main() -> None:
    """Run all rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_steps", type=int, default=2500, help="training steps of a row")
    parser.add_argument("--num_images", type=int, default=1000, help="samples judged")
    parser.add_argument("--num_likelihood_images", type=int, default=90, help="for bits/dim")
    options = parser.parse_args()
    results: dict[str, dict[str, Any] | None] = {}
    for row in ROWS:
        checkpoint = train(row, options.num_steps)
        results[row.name] = None if checkpoint is None else judge(row, checkpoint, options)
    table = make_table(results, options)
    (RUNS / "table.md").write_text(f"{table}\n")
    (RUNS / "table.json").write_text(
        json.dumps({"options": vars(options), "rows": results}, indent=2)
    )
    print(f"\n{table}\n\nwritten: {RUNS / 'table.md'}, and table.json beside it")


if __name__ == "__main__":
    main()
