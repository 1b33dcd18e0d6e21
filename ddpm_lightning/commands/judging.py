"""Judge the rows of a sweep, one after another, on all devices of a Trainer together."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.callbacks.shared import TrainerRanks
from ddpm_lightning.commands.references import ReferenceChoice
from ddpm_lightning.commands.rows import Row
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import Extractor
from ddpm_lightning.metrics.judge import Collector, FeatureSet, Metric, evaluate, warnings_of
from ddpm_lightning.metrics.record import Record, make_protocol, make_record
from ddpm_lightning.metrics.reference import Reference

POLL_SECONDS = 2.0

BAR_FORMAT = "{desc}|{bar}| {percentage:.0f}% {elapsed}<{remaining}{postfix}"


class Plan:
    """What is still to be judged; what rank 0's says is done.

    Args:
        rows: In order.
        find_more: Gives rows that have come up since it was asked last, and whether these are the
            last ones; None where there will be no others.
    """

    def __init__(
        self, rows: Iterable[Row], find_more: Callable[[], tuple[list[Row], bool]] | None = None
    ) -> None:
        self._todo = deque(rows)
        self._find_more = find_more
        self._is_over = find_more is None
        self.num_rows = len(self._todo)
        self.num_evaluations = sum(row.nfe for row in self._todo)

    def next(self) -> tuple[Row | None, bool]:
        """Give the next row, if there is one by now, and whether all is done."""
        if not self._todo and self._find_more is not None and not self._is_over:
            more, self._is_over = self._find_more()
            self._todo.extend(more)
            self.num_rows += len(more)
            self.num_evaluations += sum(row.nfe for row in more)
        if self._todo:
            return self._todo.popleft(), False
        return None, self._is_over


class JudgeTask(LightningModule):
    """One pass of a Trainer over a plan.

    All ranks judge each row together: each takes a contiguous share of the images, and features or
    their moments are reduced. Rank 0 says what comes next, and keeps the records.

    Args:
        plan: The rows; other ranks' plans are not looked at.
        extractor: Whose features are compared.
        reference: What the images are compared with.
        metrics: What is computed.
        num_images: Images of each row.
        num_repeats: How many times that, from disjoint images.
        batch_size: Images at a time on each device.
        keep: Called on rank 0 with each row and its record.
    """

    def __init__(
        self,
        plan: Plan,
        extractor: Extractor,
        reference: ReferenceChoice,
        metrics: list[Metric],
        num_images: int,
        num_repeats: int,
        batch_size: int,
        keep: Callable[[Row, Record], None],
    ) -> None:
        super().__init__()
        self._plan = plan
        self._extractor = extractor
        self._choice = reference
        self._metrics = metrics
        self._num_images = num_images
        self._num_repeats = num_repeats
        self._num_all = num_images * num_repeats
        self._batch_size = batch_size
        self._keep = keep

    def predict_dataloader(self) -> DataLoader[int]:
        """Give a single batch: the plan says what there is to do, while it is being done."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """Judge row after row until there are no more."""
        self._extractor.module.to(self.device)
        with self._together():
            reference = self._choice.load()
        index = 0
        with self._make_bar() as bar:
            while True:
                row, is_over = self._next()
                if is_over:
                    return
                if row is None:
                    time.sleep(POLL_SECONDS)
                    continue
                index += 1
                bar.total = self._plan.num_evaluations * self._num_all
                bar.set_description(f"judging {row.name} ({index} of {self._plan.num_rows})")
                record = self._judge(row, reference, bar)
                if record is not None:
                    bar.clear()
                    self._keep(row, record)
                    bar.refresh()

    def _next(self) -> tuple[Row | None, bool]:
        """Learn from rank 0 what the plan says."""
        said = self._plan.next() if self.trainer.is_global_zero else (None, False)
        return self.trainer.strategy.broadcast(said)

    def _judge(self, row: Row, reference: Reference, bar: "tqdm[Any]") -> Record | None:
        """Judge a row; only rank 0 gets the record."""
        start = time.perf_counter()
        values: list[dict[str, float]] = []
        warnings: list[str] = []
        with self._together():
            batches = row.open(self.device, self._batch_size)
        for repeat in range(self._num_repeats):
            numbers = range(repeat * self._num_images, (repeat + 1) * self._num_images)
            generated = self._collect(batches, numbers, row.nfe, bar)
            if self.trainer.is_global_zero:
                distance = self._extractor.distance_name
                values.append(evaluate(generated, reference.features, self._metrics, distance))
                warnings = warnings_of(generated, reference.features)
        if not self.trainer.is_global_zero:
            return None
        subject = {
            **row.describe(),
            row.numbers: f"0-{self._num_all - 1}",
            "batch_size": self._batch_size,
            "world_size": self.trainer.world_size,
        }
        repeats = summarise(values, self._num_images)
        record = make_record(
            repeats.pop("mean"),
            self._num_images,
            make_protocol(self._num_images, self._choice.protocol),
            subject,
            time.perf_counter() - start,
            self.device,
            warnings,
        )
        record["repeats"] = repeats
        if self._choice.file is not None:
            record["reference_file"] = self._choice.file
        return record

    def _collect(
        self,
        batches: Callable[[Sequence[int]], Iterator[Tensor]],
        numbers: range,
        nfe: int,
        bar: "tqdm[Any]",
    ) -> FeatureSet:
        """Gather the features of images, of which this rank makes its share."""
        ranks = TrainerRanks(self.trainer)
        share = ranks.share(numbers)
        collector = Collector(self._extractor, self._metrics)
        num_judged = float(numbers.start)
        with self._together():
            for images in batches(share):
                collector.add(images)
                num_done = len(images) * len(numbers) / len(share)  # the other ranks' too
                bar.update(min(num_done * nfe, (bar.total or 0) - bar.n))
                num_judged += num_done
                bar.set_postfix_str(f"{num_judged:,.0f} of {self._num_all:,} images", refresh=False)
        return collector.finish(ranks)

    def _make_bar(self) -> "tqdm[Any]":
        return tqdm(
            total=self._plan.num_evaluations * self._num_all,
            disable=not self.trainer.is_global_zero,
            bar_format=BAR_FORMAT,
            **bar_options(),
        )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Stop all ranks where one refuses something, so that none waits; rank 0 says why."""
        reason = None
        try:
            yield
        except InputError as error:
            reason = str(error)
        refused = torch.tensor([[reason is not None]], dtype=torch.uint8, device=self.device)
        refusing = TrainerRanks(self.trainer).concatenate(refused).flatten().nonzero().flatten()
        if len(refusing):
            reason = self.trainer.strategy.broadcast(reason, src=int(refusing[0]))
            raise InputError(str(reason)) if self.trainer.is_global_zero else SystemExit(2)


def summarise(values: list[dict[str, float]], num_images: int) -> dict[str, Any]:
    """Sum up repeats: their mean, and what a record says about them.

    Args:
        values: Metrics of each repeat.
        num_images: Images of each.

    Returns:
        mean: The values to report, by name.
        count: How many repeats.
        std: Unbiased standard deviations; None for a single repeat.
        best_of_k: The best of the k repeats, which is never the value; empty for one.
        each: The repeats' own values, and the numbers of their seeds or images.
    """
    names = list(values[0])
    columns = {name: [value[name] for value in values] for name in names}
    several = len(values) > 1
    return {
        "mean": {name: statistics.fmean(columns[name]) for name in names},
        "count": len(values),
        "std": {name: statistics.stdev(columns[name]) if several else None for name in names},
        "best_of_k": {
            name: (max if name.startswith(("is", "precision", "recall")) else min)(columns[name])
            for name in names
            if several and not name.endswith("_std")
        },
        "each": [
            {"numbers": f"{num_images * index}-{num_images * (index + 1) - 1}", "metrics": value}
            for index, value in enumerate(values)
        ],
    }


def predict(trainer: Trainer, task: JudgeTask) -> None:
    """Run the task.

    Raises:
        KeyboardInterrupt: Ctrl-C; Lightning stops its other processes first.
    """
    try:
        trainer.predict(task, return_predictions=False)
    except SystemExit as exit_:
        if exit_.code != 1:  # what Lightning makes of Ctrl-C
            raise
        raise KeyboardInterrupt from exit_
