"""Parquet and Arrow files, saved data sets and the hub, all read by the `datasets` library."""

import io
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from ddpm_lightning.data.sources import open_source
from ddpm_lightning.errors import InputError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), level).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have `datasets` convert into the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")
    return tmp_path


def table(levels: list[int], *columns: str) -> datasets.Dataset:
    cells = [{"bytes": png(level), "path": None} for level in levels]
    features = datasets.Features({column: datasets.Image() for column in columns})
    return datasets.Dataset.from_dict(dict.fromkeys(columns, cells), features)


def test_parquet_file(in_tmp: Path) -> None:
    table([3, 4], "picture").to_parquet(in_tmp / "some.parquet")
    source = open_source(str(in_tmp / "some.parquet"))
    assert source.splits["train"][1] == png(4)
    assert source.splits["train"].name(1) == "row 1 of split train"
    assert open_source(str(in_tmp / "some.parquet")).fingerprint == source.fingerprint
    table([3, 5], "picture").to_parquet(in_tmp / "some.parquet")
    assert open_source(str(in_tmp / "some.parquet")).fingerprint != source.fingerprint


def test_folder_of_parquet_files(in_tmp: Path) -> None:
    (in_tmp / "set").mkdir()
    for split, levels in {"train": [1, 2], "validation": [3], "test": [4]}.items():
        table(levels, "image").to_parquet(in_tmp / "set" / f"{split}-00000-of-00001.parquet")
    splits = open_source(str(in_tmp / "set")).splits
    assert {name: split[0] for name, split in splits.items()} == {
        "train": png(1), "val": png(3), "test": png(4)
    }  # fmt: skip


@pytest.mark.parametrize("with_splits", [False, True])
def test_saved_to_disk(in_tmp: Path, with_splits: bool) -> None:
    saved = table([1, 2], "image")
    if with_splits:
        saved = datasets.DatasetDict(train=saved, validation=table([3], "image"))
    saved.save_to_disk(in_tmp / "saved")
    splits = open_source(str(in_tmp / "saved")).splits
    assert splits["train"][1] == png(2)
    assert list(splits) == (["train", "val"] if with_splits else ["train"])


def test_missing_and_outside_images_of_a_table(in_tmp: Path) -> None:
    (in_tmp / "1.png").write_bytes(png(1))
    cells = [None, {"bytes": None, "path": str(in_tmp / "1.png")}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features).save_to_disk(in_tmp / "saved")
    images = open_source(str(in_tmp / "saved")).splits["train"]
    assert images[1] == (in_tmp / "1.png").read_bytes()
    with pytest.raises(ValueError, match="the row has no image"):
        _ = images[0]


@pytest.mark.parametrize("preferred", ["image", "img"])
def test_column_called_image_is_taken(in_tmp: Path, preferred: str) -> None:
    table([1], "mask", preferred).save_to_disk(in_tmp / "saved")
    assert len(open_source(str(in_tmp / "saved")).splits["train"]) == 1


@pytest.mark.parametrize("columns", [("left", "right"), ("image", "img")])
def test_several_columns_of_images(in_tmp: Path, columns: tuple[str, ...]) -> None:
    table([1], *columns).save_to_disk(in_tmp / "saved")
    with pytest.raises(InputError, match=f"several columns of images \\({', '.join(columns)}\\)"):
        open_source(str(in_tmp / "saved"))


def test_table_without_images(in_tmp: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(in_tmp / "saved")
    with pytest.raises(InputError, match="no column of type Image, but text"):
        open_source(str(in_tmp / "saved"))


def test_table_without_training_split(in_tmp: Path) -> None:
    datasets.DatasetDict(test=table([1], "image")).save_to_disk(in_tmp / "saved")
    with pytest.raises(InputError, match="no rows in a split train, but test"):
        open_source(str(in_tmp / "saved"))


@pytest.mark.parametrize("beside_data", [False, True])
def test_code_of_a_data_set_is_not_run(beside_data: bool, in_tmp: Path) -> None:
    """A file of Python that is called as its folder is: such were run, once."""
    folder, victim = in_tmp / "code", in_tmp / "victim"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(victim)!r}, 'w')\n")
    if beside_data:
        table([2], "image").to_parquet(folder / "train.parquet")
    with pytest.raises(InputError) as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)
    assert not victim.exists()


def test_broken_parquet_file(in_tmp: Path) -> None:
    (in_tmp / "some.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"some\.parquet cannot be loaded"):
        open_source(str(in_tmp / "some.parquet"))


@pytest.mark.parametrize(
    "setting",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {"HTTPS_PROXY": "http://127.0.0.1:9"},
    ],
)
def test_hub_out_of_reach(tmp_path: Path, setting: dict[str, str]) -> None:
    code = """
from ddpm_lightning.data.sources import open_source
from ddpm_lightning.errors import InputError
try:
    open_source("digist")
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), **setting}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(
        "--data.source digist is no folder here (did you mean digits?), and the Hugging Face hub "
        "is out of reach ("
    ), done.stderr
    assert done.stdout.count("\n") == 1
    assert "Retry" not in done.stderr  # six tries would take 24 seconds


def test_tables_differ_though_they_are_asked_to_be_held_in_memory(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    sources = []
    for name, level in {"a": 1, "b": 2}.items():
        (in_tmp / name).mkdir()
        table([level], "image").to_parquet(in_tmp / name / "train.parquet")
        table([level], "image").to_parquet(in_tmp / f"{name}.parquet")
        table([level], "image").save_to_disk(in_tmp / f"{name}-saved")
        sources += [name, f"{name}.parquet", f"{name}-saved"]
    fingerprints = {open_source(str(in_tmp / source)).fingerprint for source in sources}
    assert len(fingerprints) == 6
