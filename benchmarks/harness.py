"""Take two things' times in turn, and keep ratios: one machine's times say nothing elsewhere."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
PACKAGES = ("ddpm-lightning", "torch", "lightning", "diffusers", "datasets", "numpy")

Action = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Of the row.
        what: What is measured, and against what.
        unit: Of `ours` and `peer`.
        ours: Median of this project's figures.
        peer: Median of the peer's.
        ratio: Median over the rounds of ours / peer.
        bound: Whether the target is a lower or an upper bound of the ratio.
        target: That bound.
        runs: Rounds.
    """

    name: str
    what: str
    unit: str
    ours: float
    peer: float
    ratio: float
    bound: Literal["at least", "at most"]
    target: float
    runs: int

    @property
    def is_met(self) -> bool:
        """Whether the ratio keeps to the target."""
        return self.ratio >= self.target if self.bound == "at least" else self.ratio <= self.target


def seconds_of(action: Action) -> float:
    """Run something and give the seconds that it took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(ours: Action, peer: Action, runs: int) -> list[tuple[float, float]]:
    """Take the seconds of two things in turn, after one round that does not count."""
    ours()
    peer()
    rounds = []
    for index in range(runs):
        # who goes first changes, so that neither always finds the machine as the other left it
        if index % 2:
            theirs = seconds_of(peer)
            rounds.append((seconds_of(ours), theirs))
        else:
            mine = seconds_of(ours)
            rounds.append((mine, seconds_of(peer)))
    return rounds


def rates(rounds: Sequence[tuple[float, float]], count: float) -> list[tuple[float, float]]:
    """Turn seconds into things a second."""
    return [(count / mine, count / theirs) for mine, theirs in rounds]


def make_row(
    name: str,
    what: str,
    unit: str,
    rounds: Sequence[tuple[float, float]],
    bound: Literal["at least", "at most"],
    target: float,
) -> Row:
    """Sum rounds of (ours, peer) up to a row."""
    return Row(
        name,
        what,
        unit,
        statistics.median(mine for mine, _ in rounds),
        statistics.median(theirs for _, theirs in rounds),
        statistics.median(mine / theirs for mine, theirs in rounds),
        bound,
        target,
        len(rounds),
    )


def text_of(row: Row) -> str:
    """Lay a row out for the screen."""
    verdict = "met" if row.is_met else "MISSED"
    return (
        f"{row.name}: {row.ours:.4g} against {row.peer:.4g} {row.unit}: ratio {row.ratio:.3f}, "
        f"target {row.bound} {row.target:g} ({verdict}, {row.runs} runs)"
    )


def keep(rows: Sequence[Row]) -> None:
    """Write rows to results.json, in the place of older ones of the same names."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = {row.name for row in rows}
    machine = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    kept = [item for item in kept if item["name"] not in names]
    kept += [{**asdict(row), "is_met": row.is_met, **machine} for row in rows]
    kept.sort(key=lambda item: str(item["name"]))
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
