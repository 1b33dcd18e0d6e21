"""The table of the ablation: its order beside the paper's, its text, a row that diverged."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from experiments import ablation
from experiments.ablation import ROWS, compare_order, make_table

AS_PAPER = {row.name: row.fid or float("inf") for row in ROWS}
OPTIONS = argparse.Namespace(num_steps=2500, num_images=1000, num_likelihood_images=90)


def results(found: dict[str, float]) -> dict[str, dict[str, Any] | None]:
    """Give metrics of these distances; a row of infinite distance has diverged."""
    return {
        name: None
        if fd == float("inf")
        else {ablation.FD: fd, ablation.KD: fd / 1000, ablation.BITS: 3.5}
        for name, fd in found.items()
    }


def test_the_papers_own_numbers_are_in_its_order() -> None:
    # 6 pairs of the four numbers; 2 x 4 of a number and a dash; two dashes are in no order
    pairs = list(compare_order(AS_PAPER))
    assert len(pairs) == 14
    assert all(as_in_paper for _, _, as_in_paper in pairs)
    assert ("noise_simple", "mu_mse", True) in pairs


def test_a_pair_in_the_other_order_is_told() -> None:
    found = {**AS_PAPER, "mu_mse": 20.0}  # before row 1, whose number is 23.69
    assert [pair[:2] for pair in compare_order(found) if not pair[2]] == [
        ("mu_bound_learned", "mu_mse")
    ]
    text = make_table(results(found), OPTIONS)
    assert "Of the 14 pairs" in text
    assert "13 come out in that order; not so: 1 before 3." in text


def test_table_has_a_line_for_each_row() -> None:
    lines = make_table(results(AS_PAPER), OPTIONS).splitlines()
    assert lines[2] == (
        "| 1 | mean | L, learned diagonal variance | 23.69 | 0.0237 | 3.500 | 23.69 |"
    )
    assert lines[4] == "| 3 | mean | squared error | diverged | – | – | – |"
    assert {line.count("|") for line in lines[:8]} == {8}


def test_rows_are_the_overlays() -> None:
    files = {path.stem for path in ablation.OVERLAYS.glob("*.yaml")}
    assert {row.name for row in ROWS} - files == {"noise_simple"}
    assert files <= {row.name for row in ROWS}


def test_the_documents_table_is_what_is_printed() -> None:
    """Its numbers give its lines and its sentence about their order."""
    text = (ablation.OVERLAYS.parents[1] / "docs" / "ablation.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found: dict[str, dict[str, Any] | None] = {}
    for row, line in zip(ROWS, lines[2:], strict=True):
        fd, kd, bits = (float(cell) for cell in line.split("|")[4:7])
        found[row.name] = {ablation.FD: fd, ablation.KD: kd, ablation.BITS: bits}
    table, told, order = make_table(found, OPTIONS).split("\n\n")
    assert table.splitlines() == lines
    for sentence in (told, order):
        assert sentence in " ".join(text.split())


@pytest.mark.slow
def test_a_row_is_trained_judged_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "ROWS", ROWS[:1])
    sizes = ("num_steps", "num_images", "num_likelihood_images")
    monkeypatch.setattr("sys.argv", ["ablation", *(f"--{size}=4" for size in sizes)])
    ablation.main()
    table = (ablation.RUNS / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert (ablation.RUNS / "table.json").exists()
    ablation.main()
    assert "$ python" not in capsys.readouterr().out
    assert (ablation.RUNS / "table.md").read_text() == table
