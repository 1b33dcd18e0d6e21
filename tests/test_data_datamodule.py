"""From a source to batches, without a trainer."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpm_lightning.data.batches import ImageSet
from ddpm_lightning.data.cache import CachedImages
from ddpm_lightning.data.datamodule import Batch, ImageDataModule
from ddpm_lightning.errors import InputError

Make = Callable[..., ImageDataModule]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(cache_dir: str) -> Make:
    def make(**arguments: Any) -> ImageDataModule:
        return ImageDataModule(cache_dir=cache_dir, **arguments)

    return make


def write_images(folder: Path, num_images: int, size: int = 4, mode: str = "L") -> None:
    """Write images whose left half has level 2 i and whose right half 2 i + 1."""
    folder.mkdir(parents=True)
    for index in range(num_images):
        levels = np.full((size, size), 2 * index, dtype=np.uint8)
        levels[:, size // 2 :] += 1
        Image.fromarray(levels).convert(mode).save(folder / f"{index:03}.png")


def pretend(
    data: ImageDataModule, rank: int = 0, world_size: int = 1, accumulate: int = 1, step: int = 0
) -> ImageDataModule:
    """Attach what the data module asks of a trainer: real ranks need processes and say no more."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        global_step=step,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=None,
    )
    return data


def cached(data: ImageDataModule) -> CachedImages:
    assert isinstance(data.train_images, ImageSet)
    return data.train_images.cached


def take(loader: DataLoader[Batch], num_batches: int) -> list[Batch]:
    return list(itertools.islice(loader, num_batches))


def join(batches: list[Batch]) -> Batch:
    positions = np.concatenate([batch.positions for batch in batches])
    return Batch(torch.cat([batch.images for batch in batches]), positions)


def assert_equal(ours: Batch, theirs: Batch) -> None:
    assert ours.images.dtype == theirs.images.dtype == torch.uint8
    assert ours.positions.dtype == theirs.positions.dtype == np.int64
    assert torch.equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.positions, theirs.positions)


# the default


def test_digits_are_the_default(make: Make) -> None:
    data = make()
    data.prepare_data()
    data.setup("fit")
    assert data.image_shape == (1, 8, 8)
    assert (data.num_train, data.num_val) == (1707, 90)
    (batch,) = take(data.train_dataloader(), 1)
    assert batch.images.shape == (64, 1, 8, 8)
    np.testing.assert_array_equal(batch.positions, np.arange(64))
    mean, std = data.channel_statistics
    pixels = torch.from_numpy(data.train_images[np.arange(1707)]).float()
    torch.testing.assert_close((mean, std), (pixels.mean()[None], pixels.std(correction=0)[None]))


def test_statistics_of_large_images_use_some_of_them(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lightning.data.datamodule._STATISTICS_BYTES", 128)
    data = make()
    pixels = torch.from_numpy(data.train_images[np.array([0, 1706])]).float()
    torch.testing.assert_close(data.channel_statistics[0], pixels.mean()[None])


# invariant 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_is_the_same_however_it_is_cut(make: Make, world_size: int, accumulate: int) -> None:
    options = {"batch_size": 16, "flip": True, "seed": 5}
    whole = take(make(**options).train_dataloader(), 3)
    ranks = [
        take(
            pretend(make(**options), rank, world_size, accumulate).train_dataloader(),
            3 * accumulate,
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [
            part for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate]
        ]
        assert len(parts[0].images) == 16 // world_size // accumulate
        assert_equal(join(parts), batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_the_tail(make: Make, num_workers: int) -> None:
    options = {"batch_size": 700, "flip": True}  # an epoch is 1707 images, 2.4 batches
    whole = take(make(**options).train_dataloader(), 6)
    resumed = pretend(make(**options, num_workers=num_workers), step=3)
    assert_equal(join(take(resumed.train_dataloader(), 3)), join(whole[3:]))


def test_epochs_show_every_image_once(make: Make, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 25)
    data = make(source=str(tmp_path / "images"), batch_size=10, val_fraction=0)
    batch = join(take(data.train_dataloader(), 5))
    levels = batch.images[:, 0, 0, 0].reshape(2, 25)
    assert levels.sort().values.tolist() == [list(range(0, 50, 2))] * 2
    assert not torch.equal(levels[0], levels[1])
    other = make(source=str(tmp_path / "images"), batch_size=10, val_fraction=0, seed=1)
    assert not torch.equal(join(take(other.train_dataloader(), 5)).images, batch.images)


def test_flips_mirror_half_of_the_images(make: Make, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 100)
    options = {"source": str(tmp_path / "images"), "batch_size": 50, "val_fraction": 0}
    plain = join(take(make(**options).train_dataloader(), 4)).images
    flipped = join(take(make(**options, flip=True).train_dataloader(), 4)).images
    mirrored = flipped[:, 0, 0, 0] % 2 == 1
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], plain.flip(3), plain))
    assert 70 < mirrored.sum() < 130  # 200 fair coins
    assert not torch.equal(mirrored[:100], mirrored[100:])  # not a property of the image


# validation and test


def test_split_is_seeded_and_disjoint(make: Make, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40)

    def levels(seed: int) -> tuple[list[int], list[int]]:
        data = make(source=str(tmp_path / "images"), batch_size=1, val_fraction=0.25, seed=seed)
        assert data.val_images is not None
        assert data.val_images is data.test_images
        train, val = data.train_images, data.val_images
        assert len({train.sha256, val.sha256, cached(data).sha256}) == 3
        train_levels, val_levels = (s[np.arange(len(s))][:, 0, 0, 0] for s in (train, val))
        return train_levels.tolist(), val_levels.tolist()

    train, val = levels(0)
    assert len(val) == 10
    assert sorted(train + val) == list(range(0, 80, 2))
    assert levels(0) == (train, val)
    assert levels(1) != (train, val)


@pytest.mark.parametrize(("num_images", "num_val"), [(1, 0), (2, 1), (5, 1), (100, 5)])
def test_small_splits(make: Make, tmp_path: Path, num_images: int, num_val: int) -> None:
    write_images(tmp_path / "images", num_images)
    data = make(source=str(tmp_path / "images"))
    assert (data.num_train, data.num_val) == (num_images - num_val, num_val)


@pytest.mark.parametrize(
    ("present", "val", "test"),
    [
        ({"train": 4, "val": 2, "test": 3}, 2, 3),
        ({"train": 4, "test": 3}, 3, 3),
        ({"train": 4, "val": 2}, 2, 2),
    ],
)
def test_own_splits_of_the_source(
    make: Make, tmp_path: Path, present: dict[str, int], val: int, test: int
) -> None:
    for split, num_images in present.items():
        write_images(tmp_path / split, num_images)
    data = make(source=str(tmp_path), batch_size=2)
    assert data.num_train == 4
    assert len(join(take(data.val_dataloader()[0], 9)).images) == val
    batch = join(take(data.test_dataloader()[0], 9))
    assert batch.positions.tolist() == list(range(test))
    assert batch.images[:, 0, 0, 0].tolist() == list(range(0, 2 * test, 2))


def test_no_validation_images(make: Make) -> None:
    data = make(val_fraction=0)
    assert (data.num_train, data.num_val) == (1797, 0)
    assert data.val_dataloader() == data.test_dataloader() == []
    assert data.train_images.sha256 == cached(data).sha256


def test_validation_images_are_dealt_to_the_ranks(make: Make) -> None:
    options = {"batch_size": 16, "flip": True}
    whole = join(take(make(**options).val_dataloader()[0], 99))
    np.testing.assert_array_equal(whole.positions, np.arange(90))
    ranks = [pretend(make(**options), rank, 2, 2).val_dataloader()[0] for rank in range(2)]
    batches = [batch for loader in ranks for batch in loader if len(batch.positions)]
    assert max(len(batch.images) for batch in batches) == 4  # as many at once as in training
    dealt = join(sorted(batches, key=lambda batch: int(batch.positions[0])))
    assert_equal(dealt, whole)


# choices


@pytest.mark.parametrize(
    ("size", "channels", "shape"),
    [(None, None, (1, 8, 8)), (4, None, (1, 4, 4)), ((6, 4), 1, (1, 6, 4)), (None, 3, (3, 8, 8))],
)
def test_size_and_channels(make: Make, size: Any, channels: Any, shape: tuple[int, ...]) -> None:
    assert make(image_size=size, channels=channels).image_shape == shape


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1)])
def test_splits_of_other_channels(make: Make, tmp_path: Path, mode: str, channels: int) -> None:
    write_images(tmp_path / "train", 2, mode="RGB" if mode == "L" else "L")
    write_images(tmp_path / "val", 2, mode=mode)
    if mode == "L":  # grey ones become RGB: nothing is lost
        data = make(source=str(tmp_path))
        assert data.val_images is not None
        assert data.val_images.image_shape == (3, 4, 4)
    else:
        with pytest.raises(InputError, match="its val images are .* --data.channels 1"):
            make(source=str(tmp_path)).prepare_data()
        assert make(source=str(tmp_path), channels=1).num_val == 2


def test_splits_of_another_size(make: Make, tmp_path: Path) -> None:
    write_images(tmp_path / "train", 2, size=4)
    write_images(tmp_path / "test", 2, size=6)
    with pytest.raises(InputError, match=r"its test images are \(1, 6, 6\) .* --data.image_size N"):
        make(source=str(tmp_path)).prepare_data()
    assert make(source=str(tmp_path), image_size=4).image_shape == (1, 4, 4)


def test_broken_images_are_left_out(make: Make, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    (tmp_path / "images" / "001.png").write_bytes(b"")
    options = {"source": str(tmp_path / "images"), "val_fraction": 0}
    with pytest.raises(InputError, match=r"001\.png cannot be decoded"):
        make(**options).prepare_data()
    data = make(**options, on_error="skip")
    assert (data.num_train, cached(data).num_skipped) == (3, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", 0),
        ("image_size", (8, -1)),
        ("channels", 2),
        ("batch_size", 0),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("val_fraction", float("nan")),
        ("on_error", "ignore"),
        ("num_workers", -1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_options_out_of_range(make: Make, option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^--data.{option} "):
        make(**{option: value})


def test_batches_that_cannot_be_trained_with(make: Make) -> None:
    with pytest.raises(InputError, match=r"--data.batch_size 1708 is more than the 1707 training"):
        make(batch_size=1708).setup("fit")
    make(batch_size=1707).setup("fit")
    with pytest.raises(InputError, match=r"--data.batch_size 30 does not divide by 4 ranks x 1"):
        pretend(make(batch_size=30), world_size=4).setup("fit")
    pretend(make(batch_size=30), world_size=4).setup("validate")


def test_worker_gets_paths_not_pixels(make: Make) -> None:
    data = make()
    take(data.train_dataloader(), 1)
    assert len(pickle.dumps(data.train_images)) < data.num_train * 8 + 1000
