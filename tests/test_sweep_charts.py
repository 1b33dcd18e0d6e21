"""Charts of sweeps: which lines there are, what they are called, and what lies across them."""

from pathlib import Path
from typing import Any

import pytest

from ddpm_lightning.commands import sweep_charts
from ddpm_lightning.commands.sweep_charts import EVALUATIONS, draw
from ddpm_lightning.metrics.record import Record

TITLES = {"fd_Small": "fd_Small_30"}


def row(name: str, num_steps: int, nfe: int, value: float, weights: str = "ema") -> Record:
    sampler = {"name": name, "num_steps": num_steps, "spacing": "even", "clip": "static"}
    subject = {
        "path": "run/checkpoints/step=10.ckpt",
        "run": "run",
        "step": 10,
        "weights": weights,
        "sampler": sampler,
        "nfe": nfe,
    }
    protocol = {
        "reference": {"num_images": 60, "name": "digits"},
        "extractor": "Small",
        "resizer": "none",
    }
    return {
        "metrics": {"fd_Small": value},
        "repeats": {"std": {"fd_Small": None}, "count": 1},
        "num_images": 30,
        "protocol": protocol,
        "subject": subject,
    }


SWEEP = [row("ddim", steps, steps, 300 / steps) for steps in (50, 5, 20)]
SWEEP += [row("dpmpp_2m", steps, steps, 200 / steps) for steps in (5, 20)]


def drawn(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Draw a sweep of one metric, and give the figure and its axes."""
    figures: list[Any] = []
    monkeypatch.setattr(sweep_charts, "write_figure", lambda path, figure: figures.append(figure))
    draw(Path("unused.png"), records, TITLES)
    (figure,) = figures
    (axes,) = figure.axes
    return figure, axes


def test_distance_over_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each sampler, on a logarithmic axis; all told apart by colour and by shape."""
    figure, axes = drawn(SWEEP, monkeypatch)
    assert axes.get_xlabel() == EVALUATIONS
    assert axes.get_xscale() == "log"
    handles, labels = axes.get_legend_handles_labels()
    # the weights are all the same, and stand above
    assert labels == ["ddim", "dpmpp_2m even"]
    assert "ema weights" in figure.get_suptitle()
    first, second = (handle[0] for handle in handles)
    assert list(first.get_xdata()) == [5, 20, 50]
    assert list(first.get_ydata()) == [60, 15, 6]
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()


def test_a_single_point_lies_across_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _, axes = drawn([*SWEEP, row("ddpm", 250, 250, 4.0)], monkeypatch)
    assert axes.get_legend_handles_labels()[1][-1] == "ddpm at 250"
    (across,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert list(across.get_ydata()) == [4.0, 4.0]
    # alone there is nothing to lie across
    _, axes = drawn([row("ddpm", steps, steps, 4.0) for steps in (250, 1000)], monkeypatch)
    assert not [line for line in axes.lines if line.get_linestyle() == "--"]


def test_weights_are_named_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    more = [row("ddim", steps, steps, 1.0, "raw") for steps in (5, 20)]
    figure, axes = drawn([*SWEEP[:3], *more], monkeypatch)
    assert axes.get_legend_handles_labels()[1] == ["ema, ddim", "raw, ddim"]
    assert "weights" not in figure.get_suptitle()
