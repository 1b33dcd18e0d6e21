"""Statistics of real images: cached under all that they depend on, and read without trust."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_lightning.data.batches import ImageSet
from ddpm_lightning.errors import CacheError, InputError
from ddpm_lightning.metrics import reference as under_test
from ddpm_lightning.metrics.features import Extractor, make_extractor
from ddpm_lightning.metrics.judge import Metric
from ddpm_lightning.metrics.reference import (
    Reference,
    load_reference,
    reference_of,
    save_reference,
)
from tests.command_line import ended
from tests.extractors import image_set, images, small
from tests.malicious import Malicious

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path: Path) -> ImageSet:
    return image_set(tmp_path / "images", images(30))


def take(
    pictures: ImageSet, cache: Path, metrics: Sequence[Metric] = ("fd",), **options: Any
) -> Reference:
    arguments = {"name": "pictures", "extractor": small(), **options}
    return reference_of(pictures, metrics=metrics, cache_dir=cache, **arguments)


def files(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*.npz")}


def assert_same_reference(ours: Reference, theirs: Reference) -> None:
    assert ours.protocol == theirs.protocol
    (one, features, _), (other, features_too, _) = ours.features, theirs.features
    assert one.num_images == other.num_images
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance, other.covariance)
    assert (features is None) == (features_too is None)
    if features is not None and features_too is not None:
        assert torch.equal(features, features_too)


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [("fd",), ("is",), ("fd", "kid"), ("prc",)])
def test_the_second_time_it_is_read(
    metrics: Sequence[Metric], pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "new" / "cache"
    first = take(pictures, cache, metrics)
    assert first.features.moments.num_images == 30
    assert (first.features.features is not None) == bool({"kid", "prc"} & set(metrics))
    assert first.protocol == {
        "reference": {
            "name": "pictures",
            "images_sha256": pictures.sha256,
            "num_images": 30,
            "image_shape": [3, 8, 8],
            "augmentation": "none",
        },
        **small().protocol,
    }
    monkeypatch.setattr(under_test, "_collect", None)
    assert_same_reference(take(pictures, cache, metrics), first)


def test_batches_do_not_matter(pictures: ImageSet, tmp_path: Path) -> None:
    one, other = (
        take(pictures, tmp_path / str(size), batch_size=size).features.moments for size in (64, 7)
    )
    error = float((one.covariance - other.covariance).abs().max())
    assert error < 1e-6 * float(one.covariance.trace())


def test_the_key_has_all_that_it_depends_on(pictures: ImageSet, tmp_path: Path) -> None:
    cache, extractor = tmp_path / "cache", small()
    take(pictures, cache)
    seen = [files(cache)]

    def assert_new(images_: ImageSet, **options: Any) -> None:
        take(images_, cache, **options)
        assert files(cache) > seen[-1]
        seen.append(files(cache))

    def with_protocol(**fields: str) -> Extractor:
        return replace(extractor, protocol={**extractor.protocol, **fields})

    assert_new(image_set(tmp_path / "others", images(30, seed=1)))
    assert_new(image_set(tmp_path / "fewer", images(29)))
    assert_new(ImageSet(pictures.cached, np.arange(20)))  # a split of them
    assert_new(ImageSet(pictures.cached, np.arange(1, 21)))
    assert_new(image_set(tmp_path / "shape", images(30).reshape(30, 3, 4, 16)))  # the same bytes
    assert_new(pictures, metrics=("kid",))  # keeps the features
    for field in ("extractor", "layer", "resizer", "weights_sha256"):
        assert_new(pictures, extractor=with_protocol(**{field: "another"}))
    assert_new(pictures, extractor=make_extractor("efficientnet-lite0"))


def test_the_key_has_nothing_else(pictures: ImageSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    take(pictures, cache)
    before = files(cache)
    again = take(
        ImageSet(pictures.cached, np.arange(30)), cache, ("fd", "is"), name="other", batch_size=3
    )
    assert again.protocol["reference"]["name"] == "other"
    elsewhere = image_set(tmp_path / "elsewhere", images(30))
    take(elsewhere, cache, extractor=replace(small(), name="x", distance_name="fd_x"))
    assert files(cache) == before
    assert len(before) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_of_the_cache_is_made_again(
    damage: str, pictures: ImageSet, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = take(pictures, cache)
    (path,) = cache.glob("*.npz")
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-300], "empty": b"", "text": b"no"}[damage])
    assert_same_reference(take(pictures, cache), first)
    assert_same_reference(load_reference(path, small(), ["fd"]), first)


def test_a_failure_leaves_nothing(pictures: ImageSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bad = make_extractor("tests.extractors.NotFinite")
    with pytest.raises(InputError, match="not finite"):
        take(pictures, cache, extractor=bad)
    with pytest.raises(InputError, match="at least two images"):
        take(image_set(tmp_path / "one", images(1)), cache)
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}


def test_unusable_cache_folder(pictures: ImageSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.touch()
    with pytest.raises(InputError, match="cannot hold the features of the reference"):
        take(pictures, cache)


def test_several_processes_at_once(pictures: ImageSet, tmp_path: Path) -> None:
    """One computes, the others wait and read the same."""
    program = f"""
import sys
from pathlib import Path
from ddpm_lightning.metrics import reference
from tests.extractors import image_set, images, small

collect = reference._collect
reference._collect = lambda *args: print("computed") or collect(*args)
folder = Path({str(tmp_path)!r})
pictures = image_set(folder / sys.argv[1], images(30))
found = reference.reference_of(pictures, "pictures", small(), ["fd", "kid"], folder / "cache")
print(found.features.moments.mean.sum().item())
"""
    with ExitStack() as stack:
        running = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(index)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
            for index in range(3)
        ]
        for process in running:
            stack.enter_context(ended(process))
        lines = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("computed" in words for words in lines) == 1
    assert len({words[-1] for words in lines}) == 1
    assert len(files(tmp_path / "cache")) == 1


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [("fd",), ("kid",)])
def test_files_hold_plain_arrays(
    metrics: Sequence[Metric], pictures: ImageSet, tmp_path: Path
) -> None:
    reference = take(pictures, tmp_path / "cache", metrics)
    path = tmp_path / "statistics.npz"
    save_reference(path, reference)
    assert_same_reference(load_reference(path, small(), metrics), reference)
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["protocol"])) == reference.protocol
        expected = {"num_images", "mean", "covariance", "protocol"}
        assert set(file) == expected | ({"features"} if metrics == ("kid",) else set())


def saved(folder: Path, **changes: Any) -> Path:
    """A file of statistics with some of its arrays replaced, or left out where None."""
    reference = take(image_set(folder / "images", images(30)), folder / "cache", ("fd", "kid"))
    path = folder / "statistics.npz"
    save_reference(path, reference)
    with np.load(path) as file:
        arrays = {**dict(file), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mean": None}, "not a file of reference statistics"),
        ({"protocol": None}, "not a file of reference statistics"),
        ({"protocol": np.array("{")}, "not a file of reference statistics"),
        ({"protocol": np.array("[1]")}, "not a file of reference statistics"),
        ({"mean": np.zeros(23)}, "23 means, but covariances"),
        ({"mean": np.float64(1)}, "not a file of reference statistics"),
        ({"covariance": np.zeros((24, 23))}, "24 means, but covariances"),
        ({"covariance": np.full((24, 24), np.nan)}, "not finite"),
        ({"num_images": np.int64(1), "features": None}, "of fewer than two images"),
        ({"num_images": np.zeros(3)}, "not a file of reference statistics"),
        ({"features": np.zeros((29, 24), np.float32)}, "of 30 images"),
        ({"mean": np.array(["a"] * 24)}, "not a file of reference statistics"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(InputError, match=told) as error:
        load_reference(path, small(), ["fd"])
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    path = saved(tmp_path, mean=np.array([Malicious(victim)], dtype=object))
    with pytest.raises(InputError, match="not a file of reference statistics"):
        load_reference(path, small(), ["fd"])
    assert not victim.exists()


@pytest.mark.parametrize("content", ["nothing", "array", "text", "truncated", "folder"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "text":
        path.write_text("mu, sigma")
    elif content == "truncated":
        path.write_bytes(saved(tmp_path).read_bytes()[:-200])
    elif content == "folder":
        path.mkdir()
    with pytest.raises(InputError, match="other.npz: not a file of reference statistics"):
        load_reference(path, small(), ["fd"])


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(InputError, match="another extractor: extractor is tests.extractors.Small"):
        load_reference(path, make_extractor("efficientnet-lite0"), ["fd"])
    extractor = small()
    other = replace(extractor, protocol={**extractor.protocol, "weights_sha256": "0"})
    with pytest.raises(InputError, match="another extractor: weights_sha256 is"):
        load_reference(path, other, ["fd"])


@pytest.mark.parametrize("metric", ["kid", "prc"])
def test_moments_do_not_serve_all_metrics(metric: Metric, tmp_path: Path) -> None:
    path = saved(tmp_path, features=None)
    load_reference(path, small(), ["fd", "is"])
    with pytest.raises(InputError, match="holds only moments"):
        load_reference(path, small(), ["fd", metric])


def test_what_is_kept_needs_no_lock(
    pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a cache that others fill may be one that this user cannot write."""
    first = take(pictures, tmp_path / "cache")

    def refused(*arguments: object) -> None:
        raise CacheError("cannot be written")

    monkeypatch.setattr(under_test, "locked", refused)
    assert_same_reference(take(pictures, tmp_path / "cache"), first)
    with pytest.raises(CacheError):
        take(pictures, tmp_path / "other")
