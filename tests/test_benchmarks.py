"""The record of the benchmarks: what is kept of a row, and a step's parts."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import breakdown, harness
from tests.command_line import TINY

COLUMNS = {"row", "ours", "peer", "ratio", "target", "runs", "machine", "versions", "commit"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for what is committed."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(harness, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(f"a\n{harness.TABLE_START}\n{harness.TABLE_END}\nz\n")
    return tmp_path


def row(name: str, ratio: float, target: float = 1.0) -> harness.Row:
    return harness.make_row(name, "work", "s", [(ratio, 1.0)] * 3, "at most", target)


def test_a_row_replaces_the_older_one(folder: Path) -> None:
    harness.keep([row("b", 0.5), row("a", 1.5)])
    harness.keep([row("b", 0.75)])
    kept = json.loads((folder / "results.json").read_text())
    assert [(item["row"], item["ratio"], item["is_met"]) for item in kept] == [
        ("a", 1.5, False),
        ("b", 0.75, True),
    ]
    assert all(set(item) >= COLUMNS for item in kept)
    page = (folder / "page.md").read_text()
    assert page.startswith("a\n")
    assert page.endswith("\nz\n")
    assert "| a | work | 1.5 s | 1 | 1.5 | at most 1.0, **missed** | 3 |" in page
    assert page.count("| b |") == 1


def test_what_is_taken_once_keeps_its_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that read older figures say where and when those began."""
    then = harness.environment_of(folder / "run")
    monkeypatch.setattr(harness, "environment", lambda: {"machine": "another"})
    assert harness.environment_of(folder / "run") == then
    assert harness.environment_of(folder / "other")["machine"] == "another"


def test_the_median_of_the_rounds_ratios() -> None:
    rounds = [(1.0, 1.0), (4.0, 2.0), (9.0, 3.0)]
    found = harness.make_row("a", "work", "s", rounds, "at most", 1)
    assert (found.ours, found.peer, found.ratio, found.runs) == (4.0, 2.0, 2.0, 3)


def test_parts_of_a_step(folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is found under the name that Lightning has for it."""
    monkeypatch.setattr(sys, "argv", ["breakdown"])
    monkeypatch.setattr(breakdown, "MADE", [])
    (folder / "tiny.yaml").write_text(TINY.format(source=pictures))
    subject = breakdown.Timed("tiny", 4, 5, None, [f"--config={folder}/tiny.yaml"])
    found = breakdown.measure(subject)
    assert set(found) == {*breakdown.PARTS, "rest"}
    assert all(seconds > 0 for seconds in found.values()), found
    assert found["forward"] + found["backward"] > found["data"]
