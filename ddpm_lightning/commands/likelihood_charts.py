"""Rate and distortion along the reverse process, as a picture (Ho et al. 2020, Fig. 5)."""

from pathlib import Path

from torch import Tensor

from ddpm_lightning.commands.sweep_charts import make_figure, write_figure
from ddpm_lightning.metrics.record import Record


def draw(path: Path, rate: Tensor, rmse: Tensor, record: Record) -> None:
    """Draw distortion and rate over the steps of the reverse process, and one over the other.

    Args:
        path: The file, a PNG.
        rate: Bits per dimension at each index of the process, [T].
        rmse: Distortion there in grey levels, [T].
        record: What the numbers stand on.
    """
    # Fig. 5 counts the steps that are behind: T - t in the paper's t, which starts at 1
    steps = [*range(len(rate), 0, -1)]
    distortion_name, rate_name = "distortion (RMSE, levels of 255)", "rate (bits/dim)"
    figure = make_figure(11, 3.6)
    panels = [
        ("reverse process steps", distortion_name, steps, rmse.tolist()),
        ("reverse process steps", rate_name, steps, rate.tolist()),
        (rate_name, distortion_name, rate.tolist(), rmse.tolist()),
    ]
    style = "-" if len(steps) > 50 else "o-"
    for axes, (x_name, y_name, xs, ys) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(xs, ys, style, markersize=3, linewidth=1.2)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(_title(record), fontsize="medium")
    write_figure(path, figure)


def _title(record: Record) -> str:
    subject, metrics = record["subject"], record["metrics"]
    spread = f" ± {metrics['standard_error']:.2g}" if "standard_error" in metrics else ""
    return (
        f"{Path(subject['path']).stem}, {subject['weights']} weights: {record['num_images']:,} "
        f"{subject['split']} images of {Path(subject['source']).name}, "
        f"{metrics['bits_per_dim']:.3f}{spread} bits/dim"
    )
