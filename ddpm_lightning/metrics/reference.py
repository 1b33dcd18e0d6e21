"""The real images' side of a distance, computed once and kept under a key that says all of it."""

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.data.batches import Images
from ddpm_lightning.data.cache import locked
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically
from ddpm_lightning.metrics.features import Extractor
from ddpm_lightning.metrics.frechet import Moments
from ddpm_lightning.metrics.judge import Collector, FeatureSet, Metric, needs_features

REFERENCE_VERSION = 1


class Reference(NamedTuple):
    """Statistics of real images, and the protocol's fields that name them."""

    features: FeatureSet
    protocol: dict[str, Any]


def describe_reference(images: Images, name: str, extractor: Extractor) -> dict[str, Any]:
    """Give the protocol's fields that name a set of images and an extractor."""
    return {
        "reference": {
            "name": name,
            "images_sha256": images.sha256,
            "num_images": len(images),
            "image_shape": list(images.image_shape),
            "augmentation": "none",
        },
        **extractor.protocol,
    }


def reference_of(
    images: Images,
    name: str,
    extractor: Extractor,
    metrics: Collection[Metric],
    cache_dir: Path,
    batch_size: int = 64,
) -> Reference:
    """Give the statistics of a set of images, from the cache where they are known.

    Several processes may ask at once: one computes, the others wait. The images are taken as they
    are: no flips, no augmentation. A damaged file of the cache is made again.

    Args:
        images: The set.
        name: What the user calls it, for the protocol.
        extractor: Whose features.
        metrics: What they are for.
        cache_dir: Where statistics are kept.
        batch_size: Images at a time.

    Raises:
        InputError: There are fewer than two images, or the cache's folder cannot be written.
    """
    protocol = describe_reference(images, name, extractor)
    contents = {key: value for key, value in protocol["reference"].items() if key != "name"}
    keeps_features = needs_features(metrics)
    recipe = json.dumps(
        [REFERENCE_VERSION, keeps_features, contents, extractor.protocol], sort_keys=True
    )
    path = cache_dir / f"reference-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.npz"

    def kept() -> Reference | None:
        with suppress(InputError):
            return load_reference(path, extractor, metrics)._replace(protocol=protocol)
        return None

    found = kept()  # without the lock: the cache may be one that only others can write
    if found is not None:
        return found
    with locked(path, "the features of the reference"):
        found = kept()  # another process may have made it while this one waited
        if found is not None:
            return found
        reference = Reference(_collect(images, extractor, metrics, batch_size), protocol)
        save_reference(path, reference)
    return reference


def _collect(
    images: Images, extractor: Extractor, metrics: Collection[Metric], batch_size: int
) -> FeatureSet:
    collector = Collector(extractor, [metric for metric in metrics if metric != "is"])
    starts = range(0, len(images), batch_size)
    for start in tqdm(
        starts, desc="features of the reference", delay=2, unit="batch", **bar_options()
    ):
        chosen = np.arange(start, min(start + batch_size, len(images)))
        collector.add(torch.from_numpy(images[chosen]))
    return collector.finish()


def save_reference(path: Path, reference: Reference) -> None:
    """Write statistics as .npz: arrays and a line of JSON, nothing pickled."""
    moments, features, _ = reference.features
    arrays: dict[str, Any] = {
        "num_images": np.int64(moments.num_images),
        "mean": moments.mean.numpy(),
        "covariance": moments.covariance.numpy(),
        "protocol": np.array(json.dumps(reference.protocol)),
    }
    if features is not None:
        arrays["features"] = features.numpy()
    write_atomically(path, lambda file: np.savez(file, **arrays))


def load_reference(
    path: str | Path, extractor: Extractor, metrics: Collection[Metric]
) -> Reference:
    """Read saved statistics.

    Raises:
        InputError: It is no such file, another extractor's, or lacks what a metric needs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        protocol = dict(json.loads(str(arrays["protocol"])))
        moments, features = _unpack(arrays)
    except Exception as error:  # the reader stumbles over a foreign file in any way it likes
        raise InputError(f"{path}: not a file of reference statistics ({error})") from error
    for key, value in extractor.protocol.items():
        if protocol.get(key) != value:
            raise InputError(
                f"{path}: statistics of another extractor: {key} is {protocol.get(key)}, "
                f"but {extractor.name} has {value}"
            )
    if needs_features(metrics) and features is None:
        raise InputError(
            f"{path}: holds only moments; KID, precision and recall need the features: name the "
            "data set instead"
        )
    return Reference(FeatureSet(moments, features, None), protocol)


def _unpack(arrays: dict[str, Any]) -> tuple[Moments, Tensor | None]:
    """Make tensors of what a file holds.

    Raises:
        KeyError, ValueError, TypeError: Something is missing, or is not what it should be.
    """
    mean, covariance = (torch.from_numpy(arrays[name]) for name in ("mean", "covariance"))
    num_images, num_features = int(arrays["num_images"]), len(mean)
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    if covariance.shape != (num_features, num_features):
        raise ValueError(f"{num_features} means, but covariances {list(covariance.shape)}")
    if features is not None and features.shape != (num_images, num_features):
        raise ValueError(f"features {list(features.shape)} of {num_images} images")
    if num_images < 2 or not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("its numbers are not finite, or of fewer than two images")
    return Moments(num_images, mean.double(), covariance.double()), features
