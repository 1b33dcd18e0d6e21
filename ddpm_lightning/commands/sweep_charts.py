"""A sweep as curves: a picture, and scalars for the TensorBoard of the runs it is about."""

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_lightning.commands.shell import announce
from ddpm_lightning.commands.sweep import CURVES, guidance_of, settings_of, short_names
from ddpm_lightning.images import write_atomically
from ddpm_lightning.metrics.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATIONS = "network evaluations per image"

# Okabe & Ito 2008: told apart by eyes that confuse colours; and a shape each, for those on paper
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(path: Path, records: Sequence[Record], titles: dict[str, str]) -> None:
    """Draw each metric in a chart of its own, as PNG.

    Over the optimizer step where that varies, with a line for each combination of weights, sampler
    and steps; else over the guidance, where that varies and the steps do not; else over the network
    evaluations, where those vary; else over the subjects. Images from the disk are dashed lines
    across the curves, and so is what has a single point on the axis of evaluations: something to
    compare the others with, such as the ancestral sampler at 250.

    Args:
        path: The file.
        records: The rows, one at least.
        titles: What each metric is called, by its name in the records.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    drawn = {name: title for name, title in titles.items() if not name.endswith("_std")}
    figure = make_figure(7, 0.8 + 3.4 * len(drawn))
    axis, places = _layout(records)
    all_axes = figure.subplots(len(drawn), squeeze=False)[:, 0]
    for axes, (name, title) in zip(all_axes, drawn.items(), strict=True):
        axes.set_prop_cycle(color=COLOURS, marker=MARKERS)
        dashes = cycle(["--", ":", "-."])
        lines: dict[str, list[tuple[Any, float, float]]] = {}
        for (label, x), record in zip(places, records, strict=True):
            value, spread = record["metrics"][name], record["repeats"]["std"][name]
            if x is None:
                axes.axhline(value, linestyle=next(dashes), color="grey", label=label)
            else:
                lines.setdefault(label, []).append((x, value, spread or 0.0))
        for label, points in lines.items():
            xs, values, spreads = zip(*sorted(points), strict=True)
            bars = spreads if any(spreads) else None
            stands_alone = axis == EVALUATIONS and len(xs) == 1 and len(lines) > 1
            # subjects side by side have no way from one to the next
            line, *_ = axes.errorbar(
                xs,
                values,
                bars,
                label=f"{label} at {xs[0]}" if stands_alone else label,
                linestyle="-" if axis else "",
                capsize=3,
            )
            line.set(markersize=5, linewidth=1.4)
            if stands_alone:
                axes.axhline(values[0], linestyle="--", linewidth=1, color=line.get_color())
        axes.set_xlabel(axis)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.tick_params("x", labelrotation=0 if axis else 20)
        if axis == EVALUATIONS:  # from 5 to 1000
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        elif axis and axis != "guidance":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[0].legend(fontsize="small")
    figure.suptitle(_title(records), fontsize="medium")
    write_figure(path, figure)


def make_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of so many inches."""
    # the figure's own canvas: pyplot would look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


class RunCurves:
    """Writes scalars to RUN/fid_sweep/curves, beside and not into the run's own events.

    A run's folder that cannot be written has no curves: the records may lie elsewhere.

    Args:
        titles: What each metric is called, by its name in the records.
    """

    def __init__(self, titles: dict[str, str]) -> None:
        self._titles = titles
        self._writers: dict[str, Any] = {}

    def add(self, record: Record) -> None:
        """Add a row's values at its step; rows of no run have no curves."""
        subject = record["subject"]
        run = subject.get("run")
        if run is None:
            return
        if run not in self._writers:
            self._writers[run] = _open_curves(Path(run) / "fid_sweep" / CURVES)
        if self._writers[run] is None:
            return
        line = "-".join(settings_of(subject)).replace(" ", "")
        for name, title in self._titles.items():
            self._writers[run].add_scalar(
                f"fid_sweep/{title}/{line}", record["metrics"][name], subject["step"]
            )
        self._writers[run].flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            if writer is not None:
                writer.close()


def _open_curves(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        announce(f"no curves for TensorBoard: {folder} cannot be written ({error.strerror})")
        return None


def _layout(records: Sequence[Record]) -> tuple[str, list[tuple[str, Any]]]:
    """Choose the horizontal axis.

    Returns:
        Its label; then for each record the line it belongs to and its place on the axis, which is
        None where it has none and lies across.
    """
    subjects = [record["subject"] for record in records]
    sampled = [subject for subject in subjects if "sampler" in subject]
    by_step = len({subject["step"] for subject in sampled}) > 1
    scales = {guidance_of(subject).get("scale") for subject in sampled} - {None}
    counts = {subject["sampler"]["num_steps"] for subject in sampled}
    by_guidance = not by_step and len(scales) > 1 and len(counts) == 1
    by_nfe = not (by_step or by_guidance) and len({subject["nfe"] for subject in sampled}) > 1
    several_runs = len({subject["run"] for subject in sampled}) > 1
    names = short_names([subject["path"] for subject in subjects])
    places: list[tuple[str, Any]] = []
    for subject, name in zip(subjects, names, strict=True):
        weights, sampler, num_steps = settings_of(subject, with_guidance=not by_guidance)
        line = sampler if common_weights(records) else f"{weights}, {sampler}"
        line += "" if by_nfe else f", {num_steps} steps"
        if by_step or by_guidance or by_nfe:
            run = f"{Path(name).parent.parent}: " if several_runs else ""
            place = subject.get("step" if by_step else "nfe")
            if by_guidance:
                place = guidance_of(subject).get("scale")
            places.append((name, None) if place is None else (run + line, place))
        else:
            places.append((line if weights else "images", name))
    axes = {
        "optimizer step": by_step,
        "guidance": by_guidance,
        EVALUATIONS: by_nfe,
    }
    return next((axis for axis, applies in axes.items() if applies), ""), places


def common_weights(records: Sequence[Record]) -> str:
    """Say which weights all rows of checkpoints have; nothing, where they differ."""
    subjects = [record["subject"] for record in records]
    kinds = {subject["weights"] for subject in subjects if "sampler" in subject}
    return kinds.pop() if len(kinds) == 1 else ""


def _title(records: Sequence[Record]) -> str:
    record = records[0]
    protocol = record["protocol"]
    reference = protocol["reference"]
    count = record["repeats"]["count"]
    weights = common_weights(records)
    lines = [
        f"{record['num_images']:,} images against {reference['num_images']:,} of "
        f"{Path(str(reference['name'])).name}" + (f", {weights} weights" if weights else ""),
        f"{protocol['extractor']}, {protocol['resizer']}",
    ]
    if count > 1:
        lines.append(f"mean and standard deviation of {count} repeats")
    return "\n".join(lines)
