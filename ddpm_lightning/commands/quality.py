"""How good the predicted x_0 is along the chain: Ho et al. 2020, Fig. 10."""

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_lightning.commands.pictures import Subject, sampling_bar, split_batches
from ddpm_lightning.commands.references import ReferenceChoice, choose_reference
from ddpm_lightning.commands.sweep_charts import make_figure, write_figure
from ddpm_lightning.denoiser import finished_images
from ddpm_lightning.images import to_uint8, write_atomically
from ddpm_lightning.metrics.features import Extractor, make_extractor
from ddpm_lightning.metrics.judge import (
    Collector,
    Metric,
    check_metrics,
    evaluate,
    metric_titles,
    warnings_of,
)
from ddpm_lightning.metrics.record import make_protocol


class Judged(NamedTuple):
    """What the predictions at one step are worth.

    Attributes:
        t: Zero-based.
        metrics: By the names that `metric_titles` has titles for.
    """

    t: int
    metrics: dict[str, float]


class Quality:
    """Judges predictions against real images, many of them at each of some steps.

    Args:
        subject: Whose chains.
        num_images: Of seeds 0, 1, ...
        extractor: As `fid` has it.
        extractor_weights: As `fid` has it.
        reference: As `fid` has it.
        batch_size: Images at a time.

    Raises:
        InputError: There is no such extractor or reference, or there are too few images.
    """

    def __init__(
        self,
        subject: Subject,
        num_images: int,
        extractor: str,
        extractor_weights: str | None,
        reference: str | None,
        batch_size: int,
    ) -> None:
        self._subject = subject
        self._num_images = num_images
        self._batch_size = batch_size
        self._extractor: Extractor = make_extractor(extractor, extractor_weights)
        # the paper's figure has both, and the score needs classes
        self._metrics: list[Metric] = ["fd", "is"] if self._extractor.has_classes else ["fd"]
        check_metrics(self._metrics, self._extractor, num_images)
        self._extractor.module.to(subject.model.device)
        self._choice: ReferenceChoice = choose_reference(
            reference, [subject.checkpoint], self._extractor, self._metrics, batch_size
        )
        self.settings = {"protocol": make_protocol(num_images, self._choice.protocol)}

    @property
    def titles(self) -> dict[str, str]:
        """What each metric is called with its number of images, by its name in the record."""
        return metric_titles(self._metrics, self._extractor.distance_name, self._num_images)

    def judge(self, shown: set[int]) -> tuple[list[Judged], list[str]]:
        """Judge the predictions at some steps, and the samples, which are the last step's.

        Args:
            shown: The steps, counted from the noise; the last is among them.

        Returns:
            The steps from the noise on, and what a reader of the numbers should know.
        """
        reference = self._choice.load().features
        batches = split_batches(range(self._num_images), self._batch_size)
        num_steps = self._subject.num_steps
        collectors = {index: Collector(self._extractor, self._metrics) for index in shown}
        timesteps: dict[int, int] = {}
        with sampling_bar(len(batches) * num_steps, "judging") as bar:
            for batch in batches:
                labels = self._subject.model.labels_of(batch)
                chain = self._subject.model.denoise(batch, self._subject.sampler, labels=labels)
                for index, step in enumerate(chain):
                    bar.update()
                    if index not in shown:
                        continue
                    is_last = index == num_steps - 1
                    images = finished_images(step) if is_last else to_uint8(step.pred_x_0)
                    collectors[index].add(images)
                    timesteps[index] = step.t
        judged, warnings = [], []
        for index in sorted(shown):
            generated = collectors.pop(index).finish()
            name = self._extractor.distance_name
            values = evaluate(generated, reference, self._metrics, name)
            judged.append(Judged(timesteps[index], values))
            warnings = warnings_of(generated, reference)  # of the numbers of images alone
        return judged, warnings

    def write(self, path: Path, judged: list[Judged], title: str) -> str:
        """Write the table and the chart beside a picture.

        Args:
            path: The picture's.
            judged: At least one step.
            title: Of the chart.

        Returns:
            The table as text.
        """
        csv_path, chart = quality_files(path)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["t", *self.titles.values()])
        writer.writerows([[t, *(metrics[name] for name in self.titles)] for t, metrics in judged])
        content = text.getvalue().encode()
        write_atomically(csv_path, lambda file: file.write(content))
        self._draw(chart, judged, title)
        lines = [["t", *self.titles.values()]]
        lines += [[str(t), *(f"{metrics[n]:.5g}" for n in self.titles)] for t, metrics in judged]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def _draw(self, path: Path, judged: list[Judged], title: str) -> None:
        drawn = {n: text for n, text in self.titles.items() if not n.endswith("_std")}
        num_timesteps = self._subject.model.process.num_timesteps
        # as Fig. 10 and rate_distortion.png count: T - t, so that the samples are at T
        steps = [num_timesteps - t for t, _ in judged]
        figure = make_figure(0.5 + 5.5 * len(drawn), 4.2)
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (name, label) in zip(panels, drawn.items(), strict=True):
            values = [metrics[name] for _, metrics in judged]
            spreads = [metrics.get(f"{name}_std", 0.0) for _, metrics in judged]
            axes.errorbar(steps, values, spreads if any(spreads) else None, fmt="o-", capsize=3)
            axes.set_xlabel("reverse process steps")
            axes.set_ylabel(label)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        figure.suptitle(title, fontsize="medium")
        write_figure(path, figure)


def quality_files(path: Path) -> tuple[Path, Path]:
    """Name the table and the chart that lie beside a picture."""
    return path.with_name(f"{path.stem}-quality.csv"), path.with_name(f"{path.stem}-quality.png")


def describe(judged: list[Judged], warnings: list[str]) -> dict[str, Any]:
    """Say for a record what was found."""
    steps = [{"t": t, "metrics": metrics} for t, metrics in judged]
    return {"quality": {"steps": steps, "warnings": warnings}}
