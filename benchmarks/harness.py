"""Take two things' times in turn, and keep ratios: one machine's times say nothing elsewhere."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
TABLE_START, TABLE_END = "<!-- rows: written by python -m benchmarks -->", "<!-- end of rows -->"
PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "diffusers",
    "denoising-diffusion-pytorch",
    "ema-pytorch",
    "datasets",
    "pyarrow",
    "pillow",
    "numpy",
)
ENVIRONMENT = "environment.json"
SHORT = 5
"""Times as many rounds, where turns are short: the machine's speed drifts by more than a target."""

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
        environment: See `environment`; where it is None, that of now.
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
    environment: dict[str, Any] | None = None

    @property
    def is_timed(self) -> bool:
        """Whether it depends on how busy the machine is."""
        return self.unit in ("s", "images/s")

    @property
    def is_met(self) -> bool:
        """Whether the ratio keeps to the target."""
        return self.ratio >= self.target if self.bound == "at least" else self.ratio <= self.target


def seconds_of(action: Action) -> float:
    """Run something and give the seconds that it took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def wait_for_device() -> None:
    """Wait until a GPU has done what this process asked of it, where it has used one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def alternate(
    ours: Action, peer: Action, runs: int, budget: float = float("inf")
) -> list[tuple[float, float]]:
    """Take the seconds of two things in turn, after one round that does not count.

    Args:
        ours: This project's.
        peer: The peer's.
        runs: Rounds.
        budget: Seconds after which no further round begins, once there have been two.
    """
    end = time.perf_counter() + budget
    ours()
    peer()
    rounds: list[tuple[float, float]] = []
    while len(rounds) < runs and (len(rounds) < 2 or time.perf_counter() < end):
        # who goes first changes, so that neither always finds the machine as the other left it
        if len(rounds) % 2:
            theirs = seconds_of(peer)
            rounds.append((seconds_of(ours), theirs))
        else:
            mine = seconds_of(ours)
            rounds.append((mine, seconds_of(peer)))
    return rounds


def rates(
    rounds: Sequence[tuple[float, float]], count: float, peer_count: float | None = None
) -> list[tuple[float, float]]:
    """Turn seconds into things a second; the peer did `peer_count` of them, where that differs."""
    theirs = count if peer_count is None else peer_count
    return [(count / mine, theirs / other) for mine, other in rounds]


ACTIONS: list[Action] = []
"""What this process repeats, where it is one side's."""


def _prepare(make: Callable[..., Action], arguments: tuple[object, ...]) -> None:
    ACTIONS.append(make(*arguments))


def _repeat(times: int) -> None:
    for _ in range(times):
        ACTIONS[0]()
    wait_for_device()


@contextmanager
def own_process(make: Callable[..., Action], *arguments: object) -> Iterator[Callable[[int], None]]:
    """Start a process of one side, which shares no allocator and no threads with the other's.

    Args:
        make: Of a module; gives what is repeated, in that process.
        arguments: Its arguments.

    Yields:
        A function that has it repeated so many times, and waits, for a GPU too.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _prepare, (make, arguments)) as pool:
        yield lambda times: pool.submit(_repeat, times).result()


def make_row(
    name: str,
    what: str,
    unit: str,
    rounds: Sequence[tuple[float, float]],
    bound: Literal["at least", "at most"],
    target: float,
    environment: dict[str, Any] | None = None,
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
        environment,
    )


def text_of(row: Row) -> str:
    """Lay a row out for the screen."""
    verdict = "met" if row.is_met else "MISSED"
    return (
        f"{row.name}: {_figure(row.ours)} against {_with_unit(row.peer, row.unit)}: "
        f"ratio {row.ratio:.3f}, target {row.bound} {row.target:g} ({verdict}, {row.runs} runs)"
    )


def environment() -> dict[str, Any]:
    """Tell where and by which code something is measured now."""
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def environment_of(folder: Path) -> dict[str, Any]:
    """Give the environment in which a folder's figures began, which are taken once and kept."""
    file = folder / ENVIRONMENT
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(environment(), indent=2) + "\n")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def keep(rows: Sequence[Row]) -> None:
    """Write rows to results.json, in the place of older ones of the same names, and the page."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = {row.name for row in rows}
    kept = [item for item in kept if item["row"] not in names] + [_entry(row) for row in rows]
    kept.sort(key=lambda item: str(item["row"]))
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    PAGE.write_text(f"{before}{TABLE_START}\n{table_of(kept)}\n{TABLE_END}{after}")


def _entry(row: Row) -> dict[str, Any]:
    where = row.environment or environment()
    figures = {
        name: value for name, value in asdict(row).items() if name not in ("name", "environment")
    }
    # times are about two cores, and the rows' own work is a load of one a thread
    is_busy = where["threads"] != 2 or where["load"] > where["threads"] + 1
    verdicts = {"is_met": row.is_met, "is_provisional": row.is_timed and is_busy}
    return {"row": row.name, **figures, **verdicts, **where}


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """Lay the content of results.json out in Markdown."""
    lines = [
        "| row | measured | ours | peer | ratio | target | runs | threads, load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in results:
        verdict = "" if item["is_met"] else ", **missed**"
        note = " (provisional)" if item["is_provisional"] else ""
        lines.append(
            f"| {item['row']} | {item['what']} | {_with_unit(item['ours'], item['unit'])} | "
            f"{_figure(item['peer'])} | {item['ratio']:.4g} | "
            f"{item['bound']} {item['target']}{verdict} | {item['runs']} | "
            f"{item['threads']}, {item['load']}{note} |"
        )
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _with_unit(value: float, unit: str) -> str:
    return f"{_figure(value)} {unit}".rstrip()  # a power has none


def _processor() -> str:
    """Name the processor, where Linux tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {platform.machine()}" if names else platform.machine()


def _commit() -> str:
    """Name the commit that is measured, and say whether files differ from it."""
    words = ("git", "describe", "--always", "--dirty", "--exclude=*")
    try:
        ran = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return ran.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
