"""The rows of a sweep: images from one checkpoint, weights and sampler, or from the disk."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.loading import load_unchanged
from ddpm_lightning.commands.run_config import RunConfig
from ddpm_lightning.commands.subjects import Checkpoint, StoredImages, Subject
from ddpm_lightning.commands.told import Guide
from ddpm_lightning.data.order import permutation
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.record import describe_guidance, describe_sampler, sampler_slug
from ddpm_lightning.randomness import NUM_SEEDS, Stream
from ddpm_lightning.samplers import Guidance, Sampler, count_evaluations

ORDER = "shuffled by seed 0"
"""Of images from the disk, by which the numbers in a record are counted."""

Batches = Callable[[Sequence[int]], Iterator[Tensor]]
"""Gives images by their numbers, batch by batch: uint8 [n, C, H, W]."""


class Row(ABC):
    """What one number is about: a supply of numbered images."""

    numbers: ClassVar[str]
    """What the numbers are."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called on the screen and in the names of files."""

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """All that its images depend on, as plain values."""

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Network evaluations that an image takes; 1 where it is only read."""

    @abstractmethod
    def open(self, device: torch.device, batch_size: int) -> Batches:
        """Get ready to give images; those of a checkpoint are made on the device."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Give the fields of a record's subject that say what it is."""

    @property
    def key(self) -> str:
        """Its name, and a hash that tells it from others of the same name."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"


@dataclass(frozen=True)
class SampledRow(Row):
    """Samples of a checkpoint: image i comes from seed i."""

    numbers: ClassVar[str] = "seeds"
    checkpoint: Checkpoint
    weights: Weights
    sampler: Sampler
    guidance: Guidance | None = None
    guide: Guide | None = None

    @property
    def name(self) -> str:
        """Such as step=500-ema-ddim-50-guidance2-bystep=100."""
        words = [self.checkpoint.path.stem, self.weights, sampler_slug(self._sampler())]
        words += [] if self.guidance is None else self.guidance.words
        words += [] if self.guide is None else [self.guide.word]
        return "-".join(words).replace(" ", "")

    @property
    def identity(self) -> list[Any]:
        """The checkpoint's content, the weights, the sampler, the guidance where there is some."""
        guide = None if self.guide is None else {"sha256": self.guide.sha256}  # wherever it lies
        guidance = describe_guidance(self.guidance, self.checkpoint.num_classes, guide)
        told = [] if guidance == "none" else [guidance]
        return [self.checkpoint.sha256, self.weights, self._sampler(), *told]

    @property
    def nfe(self) -> int:
        """The sampler's, times one or two."""
        return count_evaluations(self.sampler, self.checkpoint.process, self.guidance)

    def open(self, device: torch.device, batch_size: int) -> Batches:
        """Load the model."""
        found = self.checkpoint
        model = load_unchanged(found.path, found.sha256, self.weights).to(device)
        guide = None if self.guide is None else self.guide.load(self.weights, model).to(device)
        return lambda seeds: model.batches(
            seeds,
            self.sampler,
            batch_size,
            labels=model.labels_of(seeds),
            guidance=self.guidance,
            guide=guide,
        )

    def describe(self) -> dict[str, Any]:
        """Say what it was sampled from, and how."""
        return {
            **describe_checkpoint(self.checkpoint, self.weights),
            "sampler": self._sampler(),
            "nfe": self.nfe,
            "guidance": describe_guidance(
                self.guidance,
                self.checkpoint.num_classes,
                None if self.guide is None else self.guide.describe(),
            ),
        }

    def _sampler(self) -> dict[str, Any]:
        return describe_sampler(self.sampler, self.sampler.count_steps(self.checkpoint.process))


@dataclass(frozen=True)
class StoredRow(Row):
    """Images from the disk, shuffled: the first ones of a folder may all be of one class."""

    numbers: ClassVar[str] = "images"
    stored: StoredImages

    @property
    def name(self) -> str:
        """The folder's or file's name."""
        return self.stored.path.absolute().name

    @property
    def identity(self) -> list[Any]:
        """The pixels, and their order."""
        return [self.stored.sha256, ORDER]

    @property
    def nfe(self) -> int:
        """Reading counts as one."""
        return 1

    def open(self, device: torch.device, batch_size: int) -> Batches:
        """Read from the disk, batch by batch."""
        order = permutation(len(self.stored.images), 0, Stream.SPLIT, 0)

        def batches(indices: Sequence[int]) -> Iterator[Tensor]:
            for start in range(0, len(indices), batch_size):
                chosen = np.sort(order[indices[start : start + batch_size]])
                yield torch.from_numpy(self.stored.images[chosen])

        return batches

    def describe(self) -> dict[str, Any]:
        """Say where they lie, and what `sample` noted about them."""
        description: dict[str, Any] = {
            "path": str(self.stored.path),
            "sha256": self.stored.sha256,
            "num_images": len(self.stored.images),
            "order": ORDER,
        }
        if self.stored.settings is None:
            description["quantisation"] = "uint8 as stored; how it was rounded is not known"
        else:
            description["sample_settings"] = self.stored.settings
        return description


def describe_checkpoint(checkpoint: Checkpoint, weights: Weights) -> dict[str, Any]:
    """Give the fields of a record's subject that say which weights were judged."""
    config, run = RunConfig.of(checkpoint.run), checkpoint.run
    batch_size = checkpoint.data.get("batch_size", config.agreed("data", "batch_size"))
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "run": None if run is None else str(run.root),
        "step": checkpoint.step,
        "images_seen": None if batch_size is None else checkpoint.step * batch_size,
        "weights": weights,
        "ema_decay": config.agreed("ema", "decay") if weights == "ema" else None,
        "variance": checkpoint.process.variance,
        "dtype": checkpoint.dtype,
    }


def make_rows(
    subjects: Sequence[Subject],
    weights: Sequence[Weights],
    samplers: Sequence[Sampler],
    guidances: Sequence[Guidance | None],
    guide: Guide | None = None,
) -> list[Row]:
    """Combine each checkpoint with all else; images from the disk are one row."""
    rows: list[Row] = []
    for subject in subjects:
        if isinstance(subject, StoredImages):
            rows.append(StoredRow(subject))
        else:
            rows += [
                SampledRow(subject, kind, sampler, *_guided(subject, guidance, guide))
                for kind in weights
                for sampler in samplers
                for guidance in guidances
            ]
    return list({row.key: row for row in rows}.values())


def _guided(
    subject: Checkpoint, guidance: Guidance | None, guide: Guide | None
) -> tuple[Guidance | None, Guide | None]:
    """Leave a guide out where it changes nothing: a row is the same row then as without it."""
    if guide is None:
        return guidance, None
    changes = guidance is not None and guidance.scale != 1 and subject.sha256 != guide.sha256
    return (guidance, guide) if changes else (None, None)


def settle_num_images(
    subjects: Sequence[Subject], num_images: int | None, num_repeats: int, default: int
) -> int:
    """Find out how many images to judge, and see that they are to be had.

    Args:
        subjects: What is judged.
        num_images: How many were asked for.
        num_repeats: How many times as many are needed.
        default: How many to sample, unless told.

    Raises:
        InputError: A folder or file holds fewer, they are fewer than two, or seeds run out.
    """
    held = {
        subject.path: len(subject.images)
        for subject in subjects
        if isinstance(subject, StoredImages)
    }
    if num_images is None:
        counts = {count // num_repeats for count in held.values()}
        num_images = counts.pop() if len(counts) == 1 and len(held) == len(subjects) else default
    for path, count in held.items():
        if count < max(2, num_images * num_repeats):
            times = f" x --num_repeats {num_repeats}" if num_repeats > 1 else ""
            raise InputError(
                f"{path}: holds {count} image{'s' * (count != 1)}, too few for "
                f"--num_images {max(2, num_images)}{times}"
            )
    if num_images < 2:
        raise InputError(f"--num_images {num_images}: a distance needs at least two images")
    if num_images * num_repeats > NUM_SEEDS:
        raise InputError(f"--num_images {num_images}: there are {NUM_SEEDS} seeds")
    return num_images
