"""From images to numbers: one pass over the features, then every metric.

The arithmetic of KID, Inception Score, precision and recall is torch-fidelity's; the Frechet
distance is ours (`frechet.py`), in float64 from sums.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import Extractor
from ddpm_lightning.metrics.frechet import Moments, MomentSums, frechet_distance

Metric = Literal["fd", "kid", "is", "prc"]
METRICS: tuple[Metric, ...] = get_args(Metric)

KID_SUBSETS = 100  # Binkowski et al. 2018
KID_SUBSET_SIZE = 1000
IS_SPLITS = 10  # Salimans et al. 2016
PRC_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019
SHUFFLE_SEED = 2020  # of the subsets and splits: torch-fidelity's own


def check_metrics(metrics: Iterable[Metric], extractor: Extractor) -> None:
    """Refuse metrics that an extractor cannot serve.

    Raises:
        InputError: The Inception Score is asked of one without classes.
    """
    if "is" in metrics and not extractor.has_classes:
        raise InputError(
            f"extractor {extractor.name}: has no classes, which the Inception Score needs; "
            "use inception, or leave out the metric is"
        )


def needs_features(metrics: Iterable[Metric]) -> bool:
    """Tell whether single features are needed, or their sums will do."""
    return bool({"kid", "prc"} & set(metrics))


class Ranks(Protocol):
    """Processes that each have a share of the images; all make the same calls."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks."""

    def concatenate(self, rows: Tensor) -> Tensor:
        """Concatenate [N_rank, D] in the order of the ranks; the N may differ."""


class FeatureSet(NamedTuple):
    """What is known of a set of images."""

    moments: Moments
    features: Tensor | None  # float32 [N, D], where KID, precision or recall need them
    logits: Tensor | None  # float32 [N, K], where the Inception Score needs them


class Collector:
    """Gathers a set's features, batch by batch; only sums where no metric needs more.

    Args:
        extractor: Whose features.
        metrics: What they are for.
    """

    def __init__(self, extractor: Extractor, metrics: Iterable[Metric]) -> None:
        metrics = set(metrics)
        self._extractor = extractor
        self._keeps_features = needs_features(metrics)
        self._keeps_logits = "is" in metrics
        self._device = next(extractor.module.parameters()).device
        # One image of nothing tells the widths, which a rank without images must know too.
        nothing = extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=self._device))
        self._sums = MomentSums(nothing.features.shape[1], self._device)
        self._features = [nothing.features[:0].cpu()]
        self._logits = [] if nothing.logits is None else [nothing.logits[:0].cpu()]

    def add(self, images: Tensor) -> None:
        """Add uint8 images [N, C, H, W]."""
        features, logits = self._extractor(images.to(self._device))
        self._sums.add(features)
        if self._keeps_features:
            self._features.append(features.cpu())
        if self._keeps_logits and logits is not None:
            self._logits.append(logits.cpu())

    def finish(self, ranks: Ranks | None = None) -> FeatureSet:
        """Give the set, over all ranks: rank 0's images first, then rank 1's, and so on.

        Raises:
            InputError: It has fewer than two images, or features that are not finite.
        """
        features, logits = torch.cat(self._features), None
        if self._logits:
            logits = torch.cat(self._logits)
        if ranks is not None:
            self._sums.reduce(ranks.sum)
            features = ranks.concatenate(features)
            logits = None if logits is None else ranks.concatenate(logits)
        if self._sums.count < 2:
            raise InputError("a distance needs at least two images on each side")
        moments = self._sums.moments()
        if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
            raise InputError(f"extractor {self._extractor.name}: its features are not finite")
        return FeatureSet(
            moments,
            features if self._keeps_features else None,
            logits if self._keeps_logits else None,
        )


def evaluate(
    generated: FeatureSet, reference: FeatureSet, metrics: Iterable[Metric], distance_name: str
) -> dict[str, float]:
    """Compute metrics of a generated set against a reference.

    Args:
        generated: The samples.
        reference: The real images.
        metrics: fd (Frechet distance), kid, is (Inception Score), prc (precision and recall).
        distance_name: What the Frechet distance is called (`Extractor.distance_name`).

    Returns:
        Values by name; KID and Inception Score come with their standard deviation.
    """
    names = _names(distance_name)
    values: dict[str, float] = {}
    for metric in metrics:
        values |= zip(names[metric], _COMPUTE[metric](generated, reference), strict=True)
    return values


def metric_names(metrics: Iterable[Metric], distance_name: str, num_images: int) -> list[str]:
    """Name what `evaluate` gives, in its order, with the number of images: fid_2k, kid_2k, ..."""
    thousands, rest = divmod(num_images, 1000)
    count = f"{thousands}k" if rest == 0 else str(num_images)
    names = _names(distance_name)
    return [f"{name}_{count}" for metric in metrics for name in names[metric]]


def _names(distance_name: str) -> dict[Metric, list[str]]:
    """Only Inception's numbers have the plain names; others carry the extractor's."""
    suffix = distance_name.removeprefix("fid").removeprefix("fd")
    kernel = f"kd{suffix}" if suffix else "kid"
    return {
        "fd": [distance_name],
        "kid": [kernel, f"{kernel}_std"],
        "is": [f"is{suffix}", f"is{suffix}_std"],
        "prc": [f"precision{suffix}", f"recall{suffix}"],
    }


def _frechet(generated: FeatureSet, reference: FeatureSet) -> tuple[float]:
    return (frechet_distance(generated.moments, reference.moments),)


def _kid(generated: FeatureSet, reference: FeatureSet) -> tuple[float, float]:
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    assert generated.features is not None
    assert reference.features is not None
    result = kid_features_to_metric(
        generated.features,
        reference.features,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=min(KID_SUBSET_SIZE, len(generated.features), len(reference.features)),
        rng_seed=SHUFFLE_SEED,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def _inception_score(generated: FeatureSet, reference: FeatureSet) -> tuple[float, float]:
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    assert generated.logits is not None
    result = isc_features_to_metric(generated.logits, splits=IS_SPLITS, rng_seed=SHUFFLE_SEED)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def _precision_recall(generated: FeatureSet, reference: FeatureSet) -> tuple[float, float]:
    from torch_fidelity.metric_prc import (
        KEY_METRIC_PRECISION,
        KEY_METRIC_RECALL,
        prc_features_to_metric,
    )

    assert generated.features is not None
    assert reference.features is not None
    result = prc_features_to_metric(
        generated.features,
        reference.features,
        prc_neighborhood=PRC_NEIGHBOURS,
        save_cpu_ram=True,  # the whole matrix of distances would take 10 GB at 50,000 images
        verbose=False,
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


_COMPUTE: dict[Metric, Callable[[FeatureSet, FeatureSet], tuple[float, ...]]] = {
    "fd": _frechet,
    "kid": _kid,
    "is": _inception_score,
    "prc": _precision_recall,
}


def warnings_of(generated: FeatureSet, reference: FeatureSet) -> list[str]:
    """Say what a reader of a distance should know."""
    num_features = len(generated.moments.mean)
    return [
        f"{side}: {moments.num_images} images for {num_features} features; the covariance is "
        "singular and the distance too large; compare only with as many images, or use KID"
        for side, (moments, _, _) in (("samples", generated), ("reference", reference))
        if moments.num_images <= num_features
    ]
