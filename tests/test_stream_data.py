"""Streams through the data module: each kind of file, here and over HTTP."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddpm_lightning.data import stream_order
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.data.stream_batches import StreamBatches, StreamLoader, StreamLost
from ddpm_lightning.data.stream_files import StreamError
from ddpm_lightning.data.stream_images import StreamImages
from ddpm_lightning.data.stream_sources import expand_braces
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import make_extractor
from ddpm_lightning.metrics.reference import reference_of
from tests.streams import (
    SIZE,
    WRITERS,
    Server,
    add,
    numbers_of,
    pixels_of,
    png,
    serving,
    write_folder,
    write_parquet,
    write_tar,
)
from tests.test_data_datamodule import assert_equal, join, pretend, take

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_IMAGES = 205
BATCH = 16
KINDS = ["parquet", "tar", "folder"]
Make = Callable[..., ImageDataModule]


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind in a folder of its name; the files are of unequal length."""
    folder = tmp_path_factory.mktemp("streams")
    cuts = [0, 3, 50, 120, NUM_IMAGES]
    for kind, write in WRITERS.items():
        for index, (first, last) in enumerate(pairwise(cuts)):
            write(folder / kind / f"train-{index}.{kind}", range(first, last))
    write_folder(folder / "folder", range(NUM_IMAGES))
    names = sorted(path.relative_to(folder) for path in (folder / "folder").rglob("*.png"))
    (folder / "folder.txt").write_text("# images\n" + "\n".join(map(str, names)))
    return folder


@pytest.fixture(scope="module")
def server(streams: Path) -> Iterator[Server]:
    with serving(streams) as server:
        yield server


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(source: object, **options: Any) -> ImageDataModule:
        options = {"batch_size": BATCH, "val_fraction": 0, **options}
        return ImageDataModule(
            str(source), streaming=True, cache_dir=str(tmp_path / "cache"), **options
        )

    return make


def remote(server: Server, kind: str) -> str:
    names = {"folder": "folder.txt"}
    return f"{server.url}/{names.get(kind, f'{kind}/train-{{0..3}}.{kind}')}"


def order_of(data: ImageDataModule) -> stream_order.StreamOrder:
    loader = data.train_dataloader()
    assert isinstance(loader.dataset, StreamBatches)
    return loader.dataset.order


# the order


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_once_whatever_cuts_the_batches(
    make: Make, streams: Path, server: Server, kind: str
) -> None:
    """Three epochs; here and remote; no, one and three workers; ranks and accumulation."""
    options = {"flip": True, "seed": 1}
    num_steps = 3 * NUM_IMAGES // BATCH
    whole = take(make(streams / kind, **options).train_dataloader(), num_steps)
    plain = join(take(make(streams / kind, seed=1).train_dataloader(), num_steps))
    numbers = numbers_of(plain.images)
    for epoch in range(2):
        of_epoch = numbers[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES]
        assert sorted(of_epoch) == list(range(NUM_IMAGES))
    assert numbers[:NUM_IMAGES] != numbers[NUM_IMAGES : 2 * NUM_IMAGES]
    np.testing.assert_array_equal(plain.positions, np.arange(num_steps * BATCH))
    flipped = (plain.images != join(whole).images).flatten(1).any(1)
    assert 0.4 < float(flipped.float().mean()) < 0.6
    assert torch.equal(plain.images[flipped].flip(3), join(whole).images[flipped])

    for num_workers in (1, 3) if kind == "tar" else (0,):
        source = remote(server, kind) if num_workers != 1 else streams / kind
        again = take(make(source, num_workers=num_workers, **options).train_dataloader(), num_steps)
        for one, other in zip(again, whole, strict=True):
            assert_equal(one, other)
    for world_size, accumulate, num_workers in ((2, 1, 0), (4, 2, 0)):
        ranks = [
            take(
                pretend(
                    make(streams / kind, num_workers=num_workers, **options),
                    rank,
                    world_size,
                    accumulate,
                ).train_dataloader(),
                4 * accumulate,
            )
            for rank in range(world_size)
        ]
        for step in range(4):
            here = slice(step * accumulate, (step + 1) * accumulate)
            assert_equal(join([part for rank in ranks for part in rank[here]]), whole[step])


def test_fewer_blocks_than_workers(make: Make, tmp_path: Path) -> None:
    """Two of the three have nothing to do: no hang, and no image is lost at an epoch's end."""
    write_parquet(tmp_path / "one.parquet", range(10))
    batches = take(
        make(tmp_path / "one.parquet", batch_size=4, num_workers=3).train_dataloader(), 5
    )
    assert [len(batch.images) for batch in batches] == [4] * 5
    numbers = numbers_of(join(batches).images)
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_gives_the_tail_and_reads_a_window_again_at_most(
    make: Make, streams: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_order, "WINDOW_BLOCKS", 4)
    whole = take(make(streams / kind).train_dataloader(), 30)
    for step in (1, 7, 13, 25):
        resumed = pretend(make(streams / kind), step=step)
        loader = resumed.train_dataloader()
        assert_equal(join(take(loader, 30 - step)), join(whole[step:]))
        order = order_of(resumed)
        first = {
            run.window.lane: run for run in order.runs(np.arange(step * BATCH, (step + 1) * BATCH))
        }
        again = sum(int(run.offsets[0]) for run in first.values())
        assert again <= sum(run.window.stop - run.window.start for run in first.values())


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_rank_reads_its_share(
    make: Make, server: Server, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1.2 times the bytes of the images, counted by the server; workers included."""
    monkeypatch.setattr(stream_order, "WINDOW_BLOCKS", 8)
    num_images = 1024
    writer = {"parquet": lambda p, n: write_parquet(p, n, rows_per_group=8), "tar": write_tar}
    for index in range(4):
        numbers = range(index * 256, (index + 1) * 256)
        writer[kind](server.folder / f"share-{kind}" / f"{index}.{kind}", numbers)
    source = f"{server.url}/share-{kind}/{{0..3}}.{kind}"
    whole = share_bytes(server.folder / f"share-{kind}")
    read_by_one = 0
    for world_size, num_workers in ((1, 0), (2, 0), (4, 0), (2, 2)):
        for rank in range(world_size):
            data = pretend(make(source, num_workers=num_workers), rank, world_size)
            loader = data.train_dataloader()
            server.num_bytes.clear()
            take(loader, num_images // BATCH - 1)  # an epoch but for a batch: no next one begins
            read = sum(server.num_bytes.values())
            read_by_one = read_by_one or read
            # what is read ahead belongs to the next epoch, and is at most a window per lane
            assert read <= 1.2 * whole / world_size, (world_size, rank, num_workers)
            assert 0.8 * read_by_one / world_size <= read <= 1.2 * read_by_one / world_size


def share_bytes(folder: Path) -> int:
    """What there is to read: the tars, headers and all, or the images' column of Parquet files."""
    num_bytes = 0
    for path in folder.iterdir():
        if path.suffix == ".tar":
            num_bytes += path.stat().st_size
            continue
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            columns = map(metadata.row_group(group).column, range(metadata.num_columns))
            num_bytes += sum(
                column.total_compressed_size
                for column in columns
                if column.path_in_schema == "image.bytes"
            )
    return num_bytes


def test_memory_holds_windows_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen blocks of twenty images at a time, of two hundred."""
    monkeypatch.setattr(stream_order, "WINDOW_BLOCKS", 16)
    write_parquet(tmp_path / "large.parquet", range(4000), rows_per_group=20)
    batches = make(tmp_path / "large.parquet", batch_size=64).train_dataloader().dataset
    assert isinstance(batches, StreamBatches)
    held = []
    for step in range(200):
        batches.__getitems__(np.arange(step * 64, (step + 1) * 64))
        held.append(batches.reader.num_held)
    assert max(held) <= 2 * 16 * 20
    assert min(held) > 16


MEMORY = """
import resource, sys
from ddpm_lightning.data import stream_order
from ddpm_lightning.data.datamodule import ImageDataModule
stream_order.WINDOW_BYTES = 2**23
data = ImageDataModule(sys.argv[1], streaming=True, val_fraction=0, cache_dir=sys.argv[2])
batches = iter(data.train_dataloader())
def most(num_batches):
    for _ in range(num_batches):
        next(batches)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(most(100), most(data.num_train // data.batch_size))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """An epoch of 384 MiB by windows of 8: the peak stays where it was after a few of them."""
    rows = np.random.default_rng(0).integers(0, 256, 2**17 * 3072, dtype=np.uint8)
    table = pa.table({"image": pa.FixedSizeListArray.from_arrays(pa.array(rows), 3072)})
    pq.write_table(table, tmp_path / "raw.parquet", row_group_size=64, compression="none")
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "raw.parquet"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr  # of the threads, when Python ends
    before, after = map(int, found.stdout.split())
    assert after - before < 48, found.stdout  # MiB


# validation


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_images(make: Make, streams: Path, server: Server, kind: str) -> None:
    def split(source: object, seed: int) -> tuple[list[int], list[int]]:
        data = make(source, val_fraction=0.1, seed=seed)
        train = join(take(data.train_dataloader(), 12)).images[: data.num_train]
        val = join(list(data.val_dataloader()[0])).images
        assert (data.num_train, data.num_val) == (185, 20)
        return numbers_of(train), numbers_of(val)

    train, val = split(streams / kind, 0)
    assert sorted({*train, *val}) == list(range(NUM_IMAGES))
    assert val == split(remote(server, kind), 0)[1]
    assert val != split(streams / kind, 1)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_own_splits(make: Make, tmp_path: Path, kind: str) -> None:
    for split, numbers in {"train": range(20), "validation": range(20, 25), "test": [30]}.items():
        if kind == "folder":
            write_folder(tmp_path / "set" / split, numbers)
        else:
            WRITERS[kind](tmp_path / "set" / f"{split}-0.{kind}", numbers)
    data = make(tmp_path / "set", val_fraction=0.5)
    assert (data.num_train, data.num_val) == (20, 5)
    assert numbers_of(join(list(data.test_dataloader()[0])).images) == [30]


def test_index_with_splits(make: Make, streams: Path, server: Server) -> None:
    index = {"train": ["tar/train-{1,3}.tar"], "val": [f"{server.url}/tar/train-0.tar"]}
    (streams / "index.json").write_text(json.dumps(index))
    for source in (streams / "index.json", f"{server.url}/index.json"):
        data = make(source)
        assert (data.num_train, data.num_val) == (47 + 85, 3)
    (streams / "list.json").write_text('["parquet/train-{0..1}.parquet"]')
    assert make(streams / "list.json").num_train == 50


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == [f"a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"]
    for pattern in ("{3..1}", "{0..99999999}"):
        with pytest.raises(InputError, match=r"from the lower number to the higher"):
            expand_braces(pattern)


# what is in the files


def raw_columns() -> dict[str, tuple[pa.Array, dict[bytes, bytes] | None]]:
    """Columns of pixels in each form that is taken: 12 images of SIZE x SIZE."""
    rows = np.stack([pixels_of(number) for number in range(12)])
    flat = pa.array(rows.reshape(-1))
    nested = pa.array(rows.tolist(), pa.list_(pa.list_(pa.uint8())))
    feature = {"_type": "Array2D", "dtype": "uint8", "shape": [SIZE, SIZE]}
    note = json.dumps({"info": {"features": {"image": feature}}}).encode()
    return {
        "fixed_size_list": (pa.FixedSizeListArray.from_arrays(flat, SIZE * SIZE), None),
        "fixed_size_binary": (pa.array([row.tobytes() for row in rows], pa.binary(16)), None),
        "array_2d": (nested, {b"huggingface": note}),
        "binary": (pa.array([png(number) for number in range(12)]), None),
        "large_binary": (pa.array([png(n) for n in range(12)], pa.large_binary()), None),
    }


@pytest.mark.parametrize("form", list(raw_columns()))
def test_columns(make: Make, tmp_path: Path, form: str) -> None:
    column, note = raw_columns()[form]
    schema = pa.schema([pa.field("image", column.type), pa.field("id", pa.int64())], note)
    table = pa.Table.from_arrays([column, pa.array(range(12))], schema=schema)
    pq.write_table(table, tmp_path / "raw.parquet", row_group_size=5)
    data = make(tmp_path / "raw.parquet", batch_size=12)
    images = join(take(data.train_dataloader(), 1)).images
    assert images.shape == (12, 1, SIZE, SIZE)
    assert sorted(numbers_of(images)) == list(range(12))
    larger = make(tmp_path / "raw.parquet", batch_size=12, image_size=8, channels=3)
    assert join(take(larger.train_dataloader(), 1)).images.shape == (12, 3, 8, 8)


def test_features_of_datasets(make: Make, tmp_path: Path) -> None:
    import datasets

    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    first = colours.transpose(0, 3, 1, 2)
    for name, array, shape in (("last", colours, (5, 4, 3)), ("first", first, (3, 5, 4))):
        features = datasets.Features({"pixels": datasets.Array3D(shape, "uint8")})
        table = datasets.Dataset.from_dict({"pixels": list(array)}, features)
        table.to_parquet(tmp_path / f"{name}.parquet")
        images = make(tmp_path / f"{name}.parquet", batch_size=6).train_images[np.arange(6)]
        np.testing.assert_array_equal(images, first)
    cells = [{"bytes": png(number), "path": None} for number in range(6)]
    features = datasets.Features({"img": datasets.Image(), "mask": datasets.Image()})
    table = datasets.Dataset.from_dict({"img": cells, "mask": cells}, features)
    table.to_parquet(tmp_path / "images.parquet")
    images = make(tmp_path / "images.parquet", batch_size=6).train_images[np.arange(6)]
    assert numbers_of(torch.from_numpy(images)) == list(range(6))


def test_grey_and_colour(make: Make, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "set" / "1.png")
    Image.new("L", (4, 4), 9).save(tmp_path / "set" / "2.png")
    assert make(tmp_path / "set", batch_size=2).train_images[np.arange(2)][1].tolist() == (
        [[[9] * 4] * 4] * 3
    )
    Image.new("L", (4, 4), 9).save(tmp_path / "set" / "1.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "set" / "2.png")
    with pytest.raises(StreamError, match=r"2\.png has colours but .*1\.png is grey"):
        take(make(tmp_path / "set", batch_size=2).train_dataloader(), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_image_stops_with_its_name(make: Make, tmp_path: Path, num_workers: int) -> None:
    write_tar(tmp_path / "some.tar", range(8), ("broken.png", png(9)[:50]))
    data = make(tmp_path / "some.tar", batch_size=9, num_workers=num_workers)
    with pytest.raises(StreamError, match=r"^'broken.png' in .*some.tar cannot be decoded") as why:
        take(data.train_dataloader(), 1)
    assert "\n" not in str(why.value)


# tars


def test_index_of_a_tar_is_kept(make: Make, server: Server, tmp_path: Path) -> None:
    write_tar(server.folder / "kept.tar", range(30))
    make(f"{server.url}/kept.tar").prepare_data()
    server.num_bytes.clear()
    assert make(f"{server.url}/kept.tar").num_train == 30
    assert server.num_bytes["/kept.tar"] < 1000  # its stamp, and the first image
    (index,) = (tmp_path / "cache").glob("tar-*.npy")
    index.write_bytes(index.read_bytes()[:-100])
    assert make(f"{server.url}/kept.tar").num_train == 30
    write_tar(server.folder / "kept.tar", range(31))
    assert make(f"{server.url}/kept.tar").num_train == 31


@pytest.mark.parametrize("num_bytes", [100, 512, 5000, 31 * 512, 10240])
def test_truncated_tar(make: Make, tmp_path: Path, num_bytes: int) -> None:
    write_tar(tmp_path / "whole.tar", range(60))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:num_bytes])
    with pytest.raises(InputError, match=r"cut\.tar: not a whole tar"):
        make(tmp_path / "cut.tar").prepare_data()


def test_damaged_header(make: Make, tmp_path: Path) -> None:
    write_tar(tmp_path / "some.tar", range(20))
    data = bytearray((tmp_path / "some.tar").read_bytes())
    with tarfile.open(tmp_path / "some.tar") as tar:
        start = tar.getmember("000010.png").offset
    data[start : start + 200] = b"?" * 200
    (tmp_path / "some.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"no end mark after 10 images"):
        make(tmp_path / "some.tar").prepare_data()


def test_names_in_tars_are_only_names(make: Make, tmp_path: Path) -> None:
    evil = [("/etc/evil.png", png(5)), ("../../evil.png", png(6)), ("a/.hidden.png", png(7))]
    write_tar(tmp_path / "in" / "evil.tar", range(3), *evil)
    with tarfile.open(tmp_path / "in" / "evil.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    images = make(tmp_path / "in" / "evil.tar", batch_size=5).train_images
    assert sorted(numbers_of(torch.from_numpy(images[np.arange(5)]))) == [0, 1, 2, 5, 6]
    assert not list(tmp_path.rglob("*evil.png"))
    assert not Path("/etc/evil.png").exists()


def test_pairs_in_tars_are_refused(make: Make, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name in ("a.1.png", "a.2.png", "b.jpg"):
            add(tar, name, png(0))
    assert make(tmp_path / "pairs.tar").num_train == 3  # dots in names
    write_tar(tmp_path / "pairs.tar", range(3), ("000001.seg.png", png(0)))
    with pytest.raises(InputError, match=r"'000001.png' and '000001.seg.png' are two images"):
        make(tmp_path / "pairs.tar").prepare_data()


# what is refused, and what identifies


def test_refusals(make: Make, tmp_path: Path, server: Server) -> None:
    with pytest.raises(InputError, match=r"--data.on_error skip: not with --data.streaming"):
        make("x", on_error="skip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "some.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "none.txt").write_text("# nothing\n")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    kind = pa.struct({"bytes": pa.binary()})
    twice = pa.array([{"bytes": png(1)}], kind)
    pq.write_table(pa.table({"left": twice, "right": twice}), tmp_path / "two.parquet")
    pq.write_table(
        pa.table({"image": pa.array([{"bytes": None}], kind)}), tmp_path / "null.parquet"
    )
    write_tar(tmp_path / "nothing.tar", [])
    cases = {
        tmp_path / "none": "does not exist; streaming takes",
        tmp_path / "empty": "nothing in it that can be streamed",
        tmp_path / "a.tar.gz": "cannot be streamed",
        f"{server.url}/x.zip": "cannot be streamed",
        f"{server.url}/x.tar": "404 Not Found",
        "ftp://host/x.tar": "is no http:// or https:// address",
        "http://[/x.tar": "x.tar",
        tmp_path / "some.parquet": "not a whole Parquet file",
        tmp_path / "text.parquet": "no column of images, but text",
        tmp_path / "two.parquet": r"several columns of images \(left, right\)",
        tmp_path / "null.parquet": "row 0 of row group 0 in .* has no image",
        tmp_path / "bad.json": "not an index of files",
        tmp_path / "none.txt": "lists no files to train on",
        tmp_path / "nothing.tar": "has no images to train on",
        f"{tmp_path}/{{some.parquet,nothing.tar}}": "of one kind in a split",
    }
    for source, message in cases.items():
        with pytest.raises(InputError, match=message) as why:
            make(source).prepare_data()
        assert "\n" not in str(why.value), source


def test_identity(make: Make, streams: Path, server: Server, tmp_path: Path) -> None:
    for kind in ("tar", "parquet"):
        here, there = make(streams / kind), make(remote(server, kind))
        assert here.train_images.sha256 == there.train_images.sha256
        there.check_same_data({"ImageDataModule": here.state_dict()}, "last.ckpt")
        others = [
            make(streams / kind, image_size=8),
            make(streams / kind, channels=3),
            make(streams / kind, val_fraction=0.1),
            make(f"{streams}/{kind}/train-{{0..2}}.{kind}"),
        ]
        assert len({here.train_images.sha256, *(o.train_images.sha256 for o in others)}) == 5
        with pytest.raises(InputError, match=r"last.ckpt: written with data.images_sha256 "):
            others[0].check_same_data({"ImageDataModule": here.state_dict()}, "last.ckpt")
    decoded = ImageDataModule(str(streams / "folder"), cache_dir=str(tmp_path), batch_size=BATCH)
    with pytest.raises(InputError, match=r"data.streaming True, but this command has False"):
        decoded.check_same_data(
            {"ImageDataModule": make(streams / "folder").state_dict()}, "last.ckpt"
        )


def test_features_of_a_stream_are_a_reference(make: Make, streams: Path, tmp_path: Path) -> None:
    """They are those of the same images decoded beforehand, but under another name."""
    extractor = make_extractor("tests.extractors.Small")
    stream = make(streams / "folder").train_images
    decoded = ImageDataModule(
        str(streams / "folder"), cache_dir=str(tmp_path / "cache"), val_fraction=0
    ).train_images
    found, expected = (
        reference_of(images, "x", extractor, ["fd"], tmp_path / "cache")
        for images in (stream, decoded)
    )
    assert torch.equal(found.features.moments.covariance, expected.features.moments.covariance)
    assert found.protocol["reference"]["num_images"] == NUM_IMAGES
    assert (
        found.protocol["reference"]["images_sha256"]
        != expected.protocol["reference"]["images_sha256"]
    )


def test_indices_and_statistics(make: Make, streams: Path) -> None:
    for kind in KINDS:
        data = make(streams / kind, val_fraction=0.1)
        batch = join(take(data.train_dataloader(), 15))
        again = data.train_images[data.training_indices(batch.positions)]
        np.testing.assert_array_equal(again, batch.images.numpy())
        pixels = data.train_images[data.train_images.spread(10_000)].astype(np.float32)
        assert float(data.channel_statistics[0]) == pytest.approx(float(pixels.mean()))
        assert len(data.train_images.spread(7)) == 7
    decoded = ImageDataModule(cache_dir=str(streams / "digits"), batch_size=BATCH)
    batch = join(take(decoded.train_dataloader(), 2))
    again = decoded.train_images[decoded.training_indices(batch.positions)]
    np.testing.assert_array_equal(again, batch.images.numpy())


def test_a_changed_folder_is_noticed(make: Make, tmp_path: Path) -> None:
    write_folder(tmp_path / "set", range(20))
    data = make(tmp_path / "set", batch_size=20)
    loader = data.train_dataloader()
    os.utime(next((tmp_path / "set").rglob("000007.png")), (0, 0))
    with pytest.raises(StreamError, match=r"000007\.png: has changed since"):
        take(loader, 1)


def test_a_signal_between_two_waits_ends_the_next(make: Make, streams: Path) -> None:
    """It comes while a step is taken or saved, and then the server hangs."""
    loader = make(streams / "tar").train_dataloader()
    assert isinstance(loader, StreamLoader)
    batches = iter(loader)
    next(batches)
    loader.end_wait()
    with pytest.raises(StreamLost, match="a signal ended the wait"):
        next(batches)


def test_a_signal_amid_a_handover_leaves_the_workers_quiet(
    make: Make, streams: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker hands over shared memory by a handshake; broken off, its end shows a traceback."""
    data = make(streams / "tar")
    data.num_workers = 2
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    batches = iter(loader)
    next(batches)  # the workers are there
    answered = connection.deliver_challenge

    def interrupt(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        answered(*arguments)

    monkeypatch.setattr(connection, "deliver_challenge", interrupt)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: loader.end_wait())
    try:
        with pytest.raises(StreamLost, match="a signal ended the wait"):
            for _ in batches:
                pass
        time.sleep(1)  # a worker that complains has done so
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS)
def test_goes_to_other_processes_whole(make: Make, streams: Path, kind: str) -> None:
    data = make(streams / kind)
    (batch,) = take(data.train_dataloader(), 1)
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    copy = pickle.loads(pickle.dumps(loader.dataset))
    assert_equal(copy.__getitems__(np.arange(BATCH)), batch)
    assert isinstance(data.train_images, StreamImages)


def test_faults_while_training(make: Make, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty failures in a row are survived; one that lasts stops, in a worker too."""
    monkeypatch.setattr("ddpm_lightning.data.stream_batches.RETRY_DELAYS", (0.01,) * 20)
    whole = take(make(remote(server, "tar")).train_dataloader(), 25)
    count = iter(range(10**6))

    def unsteady(path: str, handler: Any) -> bool:
        if next(count) % 3:
            return False
        handler.send_file(server.folder / path.lstrip("/"), cut=3)
        return True

    def down(path: str, handler: Any) -> bool:
        handler.close_connection = True
        return True

    data = make(remote(server, "tar"))
    data.prepare_data()
    try:
        server.fault = unsteady
        for one, other in zip(take(data.train_dataloader(), 25), whole, strict=True):
            assert_equal(one, other)
        for num_workers in (0, 2):
            data.num_workers = num_workers
            server.fault = lambda path, handler: False
            seen: list[Batch] = []
            with pytest.raises(StreamError, match=r"\.tar: .* \(tried 21 times") as why:
                for batch in data.train_dataloader():
                    seen.append(batch)
                    server.fault = down
            assert "\n" not in str(why.value)
            for one, other in zip(seen, whole, strict=False):  # nothing wrong before that
                assert_equal(one, other)
    finally:
        server.fault = lambda path, handler: False
