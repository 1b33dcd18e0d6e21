"""From the name of a source to batches, under a trainer or without one."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm_lightning.data.batches import Batch, Images, ImageSet, PlainBatches, TrainingBatches
from ddpm_lightning.data.cache import (
    CachedImages,
    Channels,
    OnError,
    default_cache_dir,
    open_images,
)
from ddpm_lightning.data.items import Labels, Source, SplitName
from ddpm_lightning.data.labels import read_classes, read_labels
from ddpm_lightning.data.order import (
    GlobalOrder,
    Indices,
    PositionSampler,
    check_batch_size,
    permutation,
    validation_batches,
)
from ddpm_lightning.data.sources import open_source
from ddpm_lightning.data.stream_batches import StreamBatches, StreamLoader
from ddpm_lightning.data.stream_images import StreamImages, open_stream
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import channel_statistics
from ddpm_lightning.randomness import NUM_SEEDS, Stream

__all__ = ["Batch", "ImageDataModule"]

_STATISTICS_IMAGES = 10_000
_STATISTICS_BYTES = 2**26  # float32 copies take four times as much memory, twice


class _Sets(NamedTuple):
    train: Images
    val: ImageSet | None
    test: ImageSet | None


class ImageDataModule(LightningDataModule):
    """Images of one source, decoded once, in an order that depends on the seed and the step alone.

    Validation uses the source's own val split, else its test split, else a share of the training
    images, which are then not trained on. Test uses the test split, else what validation uses.

    Args:
        source: digits (1797 handwritten digits, 8 x 8, installed with scikit-learn), a folder of
            images, a folder with IDX (MNIST), Parquet or Arrow files, a data set saved by
            `datasets`, or the name of one on the Hugging Face hub.
        image_size: Pixels, one number for a square or height and width. Images are scaled to cover
            it and cut at the centre. By default all must have one size, which is kept.
        channels: 1 for grey, 3 for RGB. By default what the first image has.
        flip: Whether to mirror each image left to right with probability 1/2.
        batch_size: Images per optimizer step, over all ranks and accumulated batches.
        val_fraction: Share of the training images to validate on, in [0, 1), where the source has
            neither a val nor a test split; 0 for none.
        on_error: Whether an image that cannot be decoded stops the run or is left out.
        num_workers: Processes that prepare batches. In the main process that takes microseconds an
            image, so 0 is right unless the images are large or the network is very fast; with
            streaming they are decoded there.
        streaming: Whether to read images while training rather than decode all before it: from
            Parquet, tars or image files, in a folder, at a URL or on the hub.
        cache_dir: Where decoded images are kept; $DDPM_LIGHTNING_CACHE or
            ~/.cache/ddpm_lightning by default.
        seed: Of the order, the flips and the share of validation images, in [0, 2^32).

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        source: str = "digits",
        image_size: int | tuple[int, int] | None = None,
        channels: Channels | None = None,
        flip: bool = False,
        batch_size: int = 64,
        val_fraction: float = 0.05,
        on_error: OnError = "stop",
        num_workers: int = 0,
        streaming: bool = False,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and min(size) < 1:
            raise InputError(f"--data.image_size {image_size} must be at least 1 pixel")
        if channels not in (None, 1, 3):
            raise InputError(f"--data.channels {channels} must be 1 (grey) or 3 (RGB)")
        if batch_size < 1:
            raise InputError(f"--data.batch_size {batch_size} must be at least 1 image")
        if not 0 <= val_fraction < 1:
            raise InputError(f"--data.val_fraction {val_fraction} must be in [0, 1)")
        if on_error not in ("stop", "skip"):
            raise InputError(f"--data.on_error {on_error} must be stop or skip")
        if streaming and on_error == "skip":
            raise InputError(
                "--data.on_error skip: not with --data.streaming true, whose order counts every "
                "image before any is decoded"
            )
        if num_workers < 0:
            raise InputError(f"--data.num_workers {num_workers} must be at least 0")
        if not 0 <= seed < NUM_SEEDS:
            raise InputError(f"--data.seed {seed} must be in [0, {NUM_SEEDS})")
        self.source = source
        self.size = size
        self.channels = channels
        self.flip = flip
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.on_error = on_error
        self.num_workers = num_workers
        self.streaming = streaming
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.seed = seed

    def prepare_data(self) -> None:
        """Decode all images, unless an earlier call, run or process on this machine has."""
        _ = self._sets

    def setup(self, stage: str) -> None:
        """Refuse what cannot be trained with: a batch that does not divide, or too few images.

        For a network that is told classes, also images whose labels are missing or others.
        """
        if self.classes is not None:
            for images in self._sets:
                if images is not None:
                    self._labels_of(images)
        if stage == "fit":
            if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise InputError(
                    "--trainer.overfit_batches would not repeat its batches, for each step has its "
                    "own; give --data.source a folder with a few images"
                )
            check_batch_size(self.batch_size, self._world_size, self._accumulate)
            if self.batch_size > self.num_train:
                raise InputError(
                    f"--data.batch_size {self.batch_size} is more than the {self.num_train} "
                    f"training images of {self.source}"
                )
            if self.streaming:
                _ = self.channel_statistics  # reads: better before training than within a step

    @property
    def train_images(self) -> Images:
        """What is trained on."""
        return self._sets.train

    @property
    def val_images(self) -> ImageSet | None:
        """What is validated on, if anything."""
        return self._sets.val

    @property
    def test_images(self) -> ImageSet | None:
        """What is tested on, if anything."""
        return self._sets.test

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same in every set."""
        return self.train_images.image_shape

    @property
    def num_train(self) -> int:
        """Number of training images, the length of an epoch."""
        return len(self.train_images)

    @property
    def num_val(self) -> int:
        """Number of validation images."""
        return len(self.val_images) if self.val_images else 0

    def note_of_skipped(self) -> str:
        """Say how many broken images were left out, as a clause; "" for none."""
        stored = [images for images in self._sets if isinstance(images, ImageSet)]
        sets = {id(images.cached): images.cached for images in stored}
        num_skipped = sum(cached.num_skipped for cached in sets.values())
        return f" ({num_skipped:,} broken ones left out)" if num_skipped else ""

    def state_dict(self) -> dict[str, Any]:
        """Give what the order of the images depends on, for checkpoints."""
        state = {
            "source": self.source,
            "streaming": self.streaming,
            "images_sha256": self.train_images.sha256,
            "batch_size": self.batch_size,
            "flip": self.flip,
            "seed": self.seed,
        }
        return state | ({"labels_sha256": self._labels_sha256} if self._num_classes else {})

    def check_same_data(self, checkpoint: dict[str, Any], path: str) -> None:
        """Refuse to go on from a checkpoint of other images, or of another order of them.

        Raises:
            InputError: Names the first option that differs.
        """
        ours = self.state_dict()
        for key, value in checkpoint.get(type(self).__qualname__, ours).items():
            if key != "source" and ours.get(key) != value:
                raise InputError(
                    f"{path}: written with data.{key} {value}, but this command has "
                    f"{ours.get(key)}: the run would not go on as it was; give its own "
                    f"config.yaml with --config, or start a new run by --ckpt_path {path} "
                    "--run_dir NEW"
                )

    def check_held_out(self, checkpoint: dict[str, Any], path: str, stage: str) -> None:
        """Refuse to validate or test on images that a checkpoint was trained on.

        Only a share of the training images could be such: which one depends on the seed.

        Args:
            checkpoint: What it holds.
            path: Its file.
            stage: validate or test.

        Raises:
            InputError: The run held out another share of the same source.
        """
        theirs = checkpoint.get(type(self).__qualname__, {})
        train, val, test = self._sets
        held_out = val if stage == "validate" else test
        is_share = isinstance(train, ImageSet) and held_out and held_out.cached is train.cached
        is_same = theirs.get("images_sha256") == train.sha256
        if is_share and theirs.get("source") == self.source and not is_same:
            raise InputError(
                f"{path}: trained on another share of {self.source}, so that images to "
                f"{stage} on may be among those; give its run's config.yaml with --config, or its "
                "--seed_everything and --data.val_fraction"
            )

    @cached_property
    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, two float32 [C] in grey levels.

        Of at most 10,000 training images, spread evenly over the set; fewer where they are large.
        """
        bytes_each = int(np.prod(self.image_shape))
        limit = min(_STATISTICS_IMAGES, max(1, _STATISTICS_BYTES // bytes_each))
        chosen = self.train_images.spread(limit)
        return channel_statistics(torch.from_numpy(self.train_images[chosen]))

    def training_indices(self, positions: Indices) -> Indices:
        """Tell which of `train_images` are at positions of the run's order, int64 [N]."""
        if isinstance(self.train_images, StreamImages):
            return self._stream_batches(self.train_images).order.indices(positions)
        return GlobalOrder(self.num_train, self.seed).indices(positions)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches of this rank, from the trainer's step on."""
        sampler = PositionSampler(
            self.batch_size, self._world_size, self._accumulate, self._rank, self._step
        )
        images = self.train_images
        if isinstance(images, StreamImages):
            batches = self._stream_batches(images)
            return StreamLoader(
                batches,
                sampler,
                self.batch_size,
                self._accumulate,
                self.num_workers,
                pin_memory=self._device_type == "cuda",
            )
        assert isinstance(images, ImageSet)
        labels = self._labels_of(images)
        return self._loader(TrainingBatches(images, self.seed, self.flip, labels), sampler)

    def _stream_batches(self, images: StreamImages) -> StreamBatches:
        return StreamBatches(images, self.batch_size, self.seed, self.flip)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """This rank's share of the validation images, in order; no loader if there are none."""
        return self._plain_loaders(self.val_images)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """This rank's share of the test images, in order; no loader if there are none."""
        return self._plain_loaders(self.test_images)

    def _plain_loaders(self, images: ImageSet | None) -> list[DataLoader[Batch]]:
        if images is None:
            return []
        # As many images at once as in training: more might not fit into the device's memory.
        size = max(1, self.batch_size // (self._world_size * self._accumulate))
        batches = validation_batches(len(images), size, self._world_size, self._rank)
        return [self._loader(PlainBatches(images, self._labels_of(images)), batches)]

    def _loader(
        self, dataset: Dataset[Batch], batches: PositionSampler | list[Indices]
    ) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]  # annotated for lists of indices only
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # annotated for lists of examples only
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._device_type == "cuda",
        )

    # Without a trainer there is one rank, at step 0.

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def _device_type(self) -> str:
        return self.trainer.strategy.root_device.type if self.trainer else "cpu"

    @property
    def _num_classes(self) -> int:
        """How many classes the trained network is told."""
        module = self.trainer.lightning_module if self.trainer else None
        return getattr(module, "num_classes", 0)  # a module of another kind is told none

    @property
    def classes(self) -> Labels | None:
        """The training images' classes, for a network that is told them.

        Raises:
            InputError: The source has none, or another number of them, or is streamed.
        """
        if not self._num_classes:
            return None
        if self.streaming:
            raise InputError(
                f"--model.net.num_classes {self._num_classes}: labels are not read from a stream; "
                "leave --data.streaming or num_classes out"
            )
        return read_classes(self._source, self._num_classes)

    def _labels_of(self, images: Images) -> Indices | None:
        if self.classes is None:
            return None
        assert isinstance(images, ImageSet)  # a stream has no classes
        return read_labels(self._source, images, self.classes.num_classes)

    @cached_property
    def _labels_sha256(self) -> str:
        labels = self._labels_of(self.train_images)
        assert labels is not None
        return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()

    def _step(self) -> int:
        return self.trainer.global_step if self.trainer else 0

    @cached_property
    def _source(self) -> Source:
        return open_source(self.source)

    @cached_property
    def _sets(self) -> _Sets:
        train: Images
        if self.streaming:
            source, train = open_stream(
                self.source, self.size, self.channels, self.val_fraction, self.seed, self.cache_dir
            )
        else:
            source = self._source
            train = ImageSet(self._open(source, "train", self.channels))
        # Grey images become RGB for RGB training images; the reverse would lose their colours.
        channels: Channels | None = 3 if train.image_shape[0] == 3 else self.channels
        held_out = {
            name: ImageSet(self._open(source, name, channels), split=name)
            for name in source.splits
            if name != "train"
        }
        for name, images in held_out.items():
            if images.image_shape != train.image_shape:
                raise InputError(
                    f"--data.source {self.source}: its {name} images are {images.image_shape} "
                    f"(channels, height, width) but its train images {train.image_shape}; make "
                    f"them alike by --data.image_size N or --data.channels 1"
                )
        val = held_out.get("val") or held_out.get("test")
        if val is None and isinstance(train, ImageSet):
            train, val = self._split(train.cached)
        return _Sets(train, val, held_out.get("test") or val)

    def _open(self, source: Source, split: SplitName, channels: Channels | None) -> CachedImages:
        return open_images(source, split, self.size, channels, self.on_error, self.cache_dir)

    def _split(self, cached: CachedImages) -> tuple[ImageSet, ImageSet | None]:
        """Take a seeded share of the training images for validation, but leave one at least."""
        num_images = cached.shape[0]
        num_val = min(round(self.val_fraction * num_images), num_images - 1)
        if self.val_fraction and num_images > 1:
            num_val = max(1, num_val)
        if not num_val:
            return ImageSet(cached), None
        shuffled = permutation(num_images, self.seed, Stream.SPLIT, 0)
        val, train = np.sort(shuffled[:num_val]), np.sort(shuffled[num_val:])
        return ImageSet(cached, train), ImageSet(cached, val)


def _as_it_is(batch: Batch) -> Batch:
    """Collate nothing: a data set hands out whole batches."""
    return batch
