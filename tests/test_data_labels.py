"""Labels: what each kind of source gives, which image has which, and what is refused."""

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.data.items import Labels
from ddpm_lightning.data.sources import open_source
from ddpm_lightning.errors import InputError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def write_images(folder: Path, *names: str) -> None:
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(folder / name)


def write_idx(folder: Path, prefix: str, labels: list[int], magic: int = 0x0801) -> None:
    pixels = np.arange(len(labels), dtype=np.uint8).repeat(4)
    header = struct.pack(">4i", 0x0803, len(labels), 2, 2)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    body = struct.pack(">2i", magic, len(labels)) + bytes(labels)
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(body))


def write_table(path: Path, columns: dict[str, Any], **features: Any) -> None:
    count = len(next(iter(columns.values())))
    images = [np.full((4, 4), level, dtype=np.uint8) for level in range(count)]
    types = datasets.Features({"image": datasets.Image(), **features})
    datasets.Dataset.from_dict({"image": images, **columns}, types).to_parquet(path)


def labels_of(source: str | Path, split: Any = "train") -> Labels:
    return open_source(str(source)).labels[split]()


def conditional(source: str | Path, folder: Path, num_classes: int, **options: Any) -> Any:
    """The data module of a source as a trainer of a conditional network sees it."""
    options = {"batch_size": 2, **options}
    data = ImageDataModule(str(source), cache_dir=str(folder / "cache"), **options)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
        global_step=0,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(num_classes=num_classes),
    )
    return data


def refusal(data: ImageDataModule) -> str:
    with pytest.raises(InputError) as error:
        data.setup("fit")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have `datasets` convert into the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")
    return tmp_path


# what sources give


def test_digits() -> None:
    labels = labels_of("digits")
    np.testing.assert_array_equal(labels.values, load_digits().target)
    assert labels.values.dtype == np.int64
    assert (labels.num_classes, labels.names) == (10, ())


def test_idx(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", [2, 0, 1, 2])
    write_idx(tmp_path, "t10k", [1])
    assert labels_of(tmp_path).values.tolist() == [2, 0, 1, 2]
    assert labels_of(tmp_path).num_classes == 3
    assert labels_of(tmp_path, "test").values.tolist() == [1]


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    labels = labels_of(FASHION_MNIST)
    # the first ten of the data set's own list: an ankle boot, T-shirts, dresses, ...
    assert labels.values[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert np.bincount(labels.values).tolist() == [6000] * 10
    assert np.bincount(labels_of(FASHION_MNIST, "test").values).tolist() == [1000] * 10


@pytest.mark.parametrize("change", ["magic", "short", "long", "missing"])
def test_idx_labels_that_are_none(tmp_path: Path, change: str) -> None:
    write_idx(tmp_path, "train", [0, 1, 1], magic=0x0803 if change == "magic" else 0x0801)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    body = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress({"short": body[:-1], "long": body + b"x"}.get(change, body)))
    if change == "missing":
        file.unlink()
        assert not open_source(str(tmp_path)).labels
        return
    with pytest.raises(InputError, match="not an IDX file of 3 labels"):
        labels_of(tmp_path)
    # no matter to a network that is told no classes
    assert len(conditional(tmp_path, tmp_path.parent / "c", 0).train_images) == 2


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_images(tmp_path, "b/1.png", "a/deep/1.png", "a/2.png", "c/0.png")
    source = open_source(str(tmp_path))
    names = [source.splits["train"].name(index) for index in range(4)]
    assert [Path(name).relative_to(tmp_path).parts[0] for name in names] == ["a", "a", "b", "c"]
    labels = source.labels["train"]()
    assert (labels.values.tolist(), labels.names) == ([0, 0, 1, 2], ("a", "b", "c"))


def test_folders_of_splits(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/dog/1.png", "test/1.png")
    assert labels_of(tmp_path).names == ("cat", "dog")
    assert labels_of(tmp_path, "val").values.tolist() == [1]
    assert set(open_source(str(tmp_path)).labels) == {"train", "val"}
    write_images(tmp_path, "val/eel/1.png")
    with pytest.raises(InputError, match="val/eel is no class"):
        labels_of(tmp_path, "val")


def test_image_beside_the_subfolders_leaves_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/1.png", "stray.png")
    assert not open_source(str(tmp_path)).labels


CLASS = datasets.ClassLabel(names=["cat", "dog", "eel"])
INT = datasets.Value("int32")


@pytest.mark.parametrize(
    ("features", "chosen", "names"),
    [
        ({"kind": CLASS}, "kind", ("cat", "dog", "eel")),
        ({"coarse_label": CLASS, "fine_label": CLASS}, "fine_label", ("cat", "dog", "eel")),
        ({"label": INT, "kind": CLASS}, "kind", ("cat", "dog", "eel")),
        ({"label": INT, "width": INT}, "label", ()),
        ({"labels": INT}, "labels", ()),
        ({"fine_label": INT}, "fine_label", ()),
    ],
)
def test_column_of_labels(
    in_tmp: Path, features: dict[str, Any], chosen: str, names: tuple[str, ...]
) -> None:
    columns = {name: [1, 0, 2] if name == chosen else [0, 0, 0] for name in features}
    write_table(in_tmp / "t.parquet", columns, **features)
    labels = labels_of(in_tmp / "t.parquet")
    assert labels.values.tolist() == [1, 0, 2]
    assert (labels.num_classes, labels.names) == (3, names)


def test_tables_without_a_column_of_labels(in_tmp: Path) -> None:
    write_table(in_tmp / "a.parquet", {"width": [4, 4]}, width=INT)
    assert not open_source(str(in_tmp / "a.parquet")).labels
    write_table(in_tmp / "b.parquet", {"x": [0, 1], "y": [0, 1]}, x=CLASS, y=CLASS)
    with pytest.raises(InputError, match=r"several columns of labels \(x, y\)"):
        labels_of(in_tmp / "b.parquet")


# which image has which


def test_batches_have_the_labels_of_their_images(tmp_path: Path) -> None:
    count = 24
    for index in range(count):  # an image's level is its number, its class that modulo 3
        path = tmp_path / "data" / f"class{index % 3}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), index).save(path)
    # one that is left out, in the midst of the others
    (tmp_path / "data" / "class1" / "00.png").write_bytes(b"broken")
    data = conditional(tmp_path / "data", tmp_path, 3, on_error="skip", val_fraction=0.25)
    data.setup("fit")
    assert (data.num_train, data.num_val) == (18, 6)
    batches = iter(data.train_dataloader())
    seen = [next(batches) for _ in range(20)]  # beyond an epoch
    (val,) = data.val_dataloader()
    for batch in [*seen, *val]:
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, batch.images[:, 0, 0, 0].long() % 3)
    # they are part of what a run goes on with
    state = data.state_dict()
    assert len(state["labels_sha256"]) == 64
    other = conditional(tmp_path / "data", tmp_path, 0, on_error="skip", val_fraction=0.25)
    assert "labels_sha256" not in other.state_dict()
    assert next(iter(other.train_dataloader())).labels is None


# what is refused


def test_wrong_numbers_of_classes(tmp_path: Path) -> None:
    for num_classes in (9, 11):
        message = refusal(conditional("digits", tmp_path, num_classes))
        assert "has 10 classes; give --model.net.num_classes 10" in message
    write_images(tmp_path / "flat", "1.png", "2.png")
    assert "has no labels" in refusal(conditional(tmp_path / "flat", tmp_path, 2))


def test_streams_have_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a/1.png", "b/1.png")
    message = refusal(conditional(tmp_path / "data", tmp_path, 2, streaming=True))
    assert "labels are not read from a stream" in message


def test_images_without_their_label(in_tmp: Path) -> None:
    write_table(in_tmp / "t.parquet", {"label": [0, 1, None]}, label=INT)
    message = refusal(conditional(in_tmp / "t.parquet", in_tmp, 2))
    assert "row 2 of split train has label -1" in message
    write_idx(in_tmp, "train", [0, 1, 1])
    write_idx(in_tmp, "t10k", [2])
    message = refusal(conditional(in_tmp, in_tmp, 2))
    assert "image 0 has label 2, but the training images' classes are 0-1" in message
    (in_tmp / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "none for its test images" in refusal(conditional(in_tmp, in_tmp, 2))


def test_old_cache_is_good_unless_it_left_out_images(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a/1.png", "a/2.png", "b/1.png")
    options: dict[str, Any] = {"on_error": "skip", "val_fraction": 0}
    data = conditional(tmp_path / "data", tmp_path, 2, **options)
    data.setup("fit")
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    meta.write_text(meta.read_text().replace('"skipped": []', '"later": 0'))
    conditional(tmp_path / "data", tmp_path, 2, **options).setup("fit")
    meta.write_text(meta.read_text().replace('"num_skipped": 0', '"num_skipped": 1'))
    assert "remove it" in refusal(conditional(tmp_path / "data", tmp_path, 2, **options))
    conditional(tmp_path / "data", tmp_path, 0, **options).setup("fit")
