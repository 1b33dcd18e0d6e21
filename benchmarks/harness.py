"""Take two things' times in turn, and keep ratios: one machine's times say nothing elsewhere."""

import json
import os
import platform
import statistics
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


@contextmanager
def own_process(make: Callable[..., Action], *arguments: object) -> Iterator[Callable[[int], None]]:
    """Start a process of one side, which shares no allocator and no threads with the other's.

    Args:
        make: Of a module; gives what is repeated, in that process.
        arguments: Its arguments.

    Yields:
        A function that has it repeated so many times, and waits.
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
        f"{row.name}: {_figure(row.ours)} against {_with_unit(row.peer, row.unit)}: "
        f"ratio {row.ratio:.3f}, target {row.bound} {row.target:g} ({verdict}, {row.runs} runs)"
    )


def keep(rows: Sequence[Row]) -> None:
    """Write rows to results.json, in the place of older ones of the same names, and the page."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = {row.name for row in rows}
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    machine = {
        "machine": _processor(),
        "threads": threads,
        "load": round(load, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    kept = [item for item in kept if item["name"] not in names]
    # times are about two cores, and the rows' own work is a load of one a thread
    is_busy = threads != 2 or load > threads + 1
    kept += [
        {
            **asdict(row),
            "is_met": row.is_met,
            "is_provisional": row.is_timed and is_busy,
            **machine,
        }
        for row in rows
    ]
    kept.sort(key=lambda item: str(item["name"]))
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    PAGE.write_text(f"{before}{TABLE_START}\n{table_of(kept)}\n{TABLE_END}{after}")


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
            f"| {item['name']} | {item['what']} | {_with_unit(item['ours'], item['unit'])} | "
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
