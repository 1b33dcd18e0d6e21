""".npz files for `fid`, of images and of statistics: judged, or refused in one line."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.extractors import Small
from tests.properties.cases import Cases
from tests.properties.damage import damages
from tests.properties.sandbox import Sandbox, sandbox

pytestmark = pytest.mark.usefixtures("one_thread")

EXTRACTOR = f"{Small.__module__}.{Small.__name__}"
NUM_IMAGES = 4
Arrays = dict[str, Any]

IMAGES = np.random.default_rng(1).integers(0, 256, (NUM_IMAGES, 8, 8, 1), dtype=np.uint8)


def stored(arrays: Arrays, compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, allow_pickle=True, **arrays)
    return file.getvalue()


def judge(box: Sandbox, subject: str, reference: str) -> bool:
    """Whether it was refused; else there is a record, with a number."""
    result = box.run(
        *("fid", subject, "--reference", reference, "--extractor", EXTRACTOR),
        *("--accelerator", "cpu", "--num_images", str(NUM_IMAGES), "--out", "out"),
    )
    assert result is not None, "no case takes long"
    if result.status == 0:
        json.loads((box.here / "out" / "record.json").read_text())
    return result.status != 0


@pytest.fixture(scope="module")
def statistics(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    """What the statistics of the pictures hold."""
    with sandbox(pictures) as box:
        np.savez(box.here / "images.npz", IMAGES)
        assert not judge(box, "images.npz", str(pictures))
        [path] = (box.here.parent / "here-cache").glob("reference-*.npz")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


# --- changed arrays ------------------------------------------------------------------------------


def others(array: np.ndarray[Any, Any]) -> list[Any]:
    """The array with another type, shape or values, and arrays that are nothing like it."""
    kinds = [array[None], array[:-1] if array.ndim else array[None, None], array.reshape(-1)]
    if array.dtype.kind in "uif":
        kinds += [array.astype(kind) for kind in (np.int64, np.float16, np.complex128, bool, str)]
        kinds += [array.astype(np.float64) * np.nan, array.astype(np.float64) + np.inf]
        kinds += [array.astype(array.dtype.newbyteorder(">")), np.asfortranarray(array)]
    return [
        *kinds,
        np.array([{}, None], dtype=object),
        np.zeros(array.shape, dtype=[("x", "u1"), ("y", "f4")]),
        np.zeros(0),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((NUM_IMAGES, 0, 8, 1), np.uint8),
        np.zeros((NUM_IMAGES, 8, 8, 3), np.uint8),
        np.zeros((NUM_IMAGES, 8, 8, 2), np.uint8),
        np.zeros((NUM_IMAGES, 9, 7, 1), np.uint8),
        np.zeros((1, 8, 8, 1), np.uint8),
        np.array("{}"),
        np.array("[" * 10_000),
        np.array('{"reference": {"image_shape": 3}}'),
        np.array("2020-01-01", "datetime64[D]"),
        np.int64(-1),
        np.int64(0),
        np.int64(2**62),
    ]


def changes(arrays: Arrays) -> st.SearchStrategy[bytes]:
    """Files in which one array is gone, is another one, or has one more beside it."""

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        key = draw(st.sampled_from(sorted(arrays)))
        change = draw(st.sampled_from(["gone", "other", "other", "other", "more", "name"]))
        value = draw(st.sampled_from(others(np.asarray(arrays[key]))))
        content = dict(arrays)
        if change in ("gone", "name"):
            del content[key]
        if change == "name":
            content[f"{key}.x"] = arrays[key]
        if change == "other":
            content[key] = value
        if change == "more":
            content["arr_1"] = value
        return stored(content, draw(st.booleans()))

    return changed()


def odd_files() -> list[bytes]:
    one = io.BytesIO()
    np.save(one, IMAGES)
    header = one.getvalue()[:128]
    return [
        b"",
        b"text\n",
        b"PK\x05\x06" + bytes(18),
        one.getvalue(),  # .npy under this name
        header,
        header.replace(b"(4, 8, 8, 1), ", b"(4" + b"0" * 9 + b",8,8,1)"),
        stored({"arr_0": np.array([print], dtype=object)}),
        stored({}),
        stored({"arr_0": np.zeros((2**11, 2**14), np.uint8)}, compressed=True),
    ]


def run_cases(cases: Cases, pictures: Path, arrays: Arrays, run: Callable[[Sandbox], bool]) -> None:
    def check(data: bytes) -> bool:
        with sandbox(pictures) as box:
            np.savez(box.here / "images.npz", IMAGES)
            path = box.here / "case.npz"
            path.write_bytes(data)
            refused = run(box)
            assert path.read_bytes() == data
        return refused

    files = st.one_of(
        changes(arrays), changes(arrays), damages(stored(arrays)), st.sampled_from(odd_files())
    )
    cases.run(files, check, always=odd_files() if cases.are_many else ())


def test_images(cases: Cases, pictures: Path) -> None:
    run_cases(cases, pictures, {"arr_0": IMAGES}, lambda box: judge(box, "case.npz", str(pictures)))


def test_statistics(cases: Cases, pictures: Path, statistics: Arrays) -> None:
    run_cases(cases, pictures, statistics, lambda box: judge(box, "images.npz", "case.npz"))
