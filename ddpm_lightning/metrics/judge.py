"""From images to numbers: one pass over the features, then every metric.

The arithmetic of KID, Inception Score, precision and recall is torch-fidelity's; the Frechet
distance is ours (`frechet.py`), in float64 from sums.
"""

from collections.abc import Callable, Collection, Iterable
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


TOO_FEW = "a distance needs at least two images on each side"

# How each is computed, for the record: numbers are comparable where this is equal.
METHODS: dict[Metric, str] = {
    "fd": "float64, moments about the mean, divided by N - 1; root by singular values",
    "kid": f"{KID_SUBSETS} subsets of {KID_SUBSET_SIZE} or all, cubic kernel, seed {SHUFFLE_SEED}",
    "is": f"{IS_SPLITS} splits, shuffled by seed {SHUFFLE_SEED}",
    "prc": f"{PRC_NEIGHBOURS} neighbours",
}

_LEAST_IMAGES: dict[Metric, int] = {"fd": 2, "kid": 2, "is": IS_SPLITS, "prc": PRC_NEIGHBOURS + 1}


def check_metrics(
    metrics: Collection[Metric], extractor: Extractor, num_images: int | None = None
) -> None:
    """Refuse metrics that an extractor, or so few images, cannot serve.

    Args:
        metrics: Which.
        extractor: Whose features they are to be taken from.
        num_images: How many, where it is known.

    Raises:
        InputError: The Inception Score is asked of one without classes, or there are too few.
    """
    if num_images is not None:
        _check_count(metrics, num_images)
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


class OneRank:
    """The only one."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Give the tensor."""
        return tensor

    def concatenate(self, rows: Tensor) -> Tensor:
        """Give the rows."""
        return rows


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
        self._sums: MomentSums | None = None
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Add uint8 images [N, C, H, W], N >= 1."""
        features, logits = self._extractor(images.to(self._extractor.device))
        if self._sums is None:
            self._sums = MomentSums(features.shape[1], features.device)
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
        ranks = ranks or OneRank()
        # Ranks without images learn the widths of features and logits from the others.
        num_logits = self._logits[0].shape[1] if self._logits else 0
        own = [] if self._sums is None else [[len(self._sums.mean), num_logits]]
        widths = ranks.concatenate(torch.tensor(own, dtype=torch.int64).reshape(-1, 2))
        if len(widths) == 0:
            raise InputError(TOO_FEW)
        num_features, num_logits = widths[0].tolist()
        sums = self._sums or MomentSums(num_features, self._extractor.device)
        sums.reduce(ranks.sum)
        features = logits = None
        if self._keeps_features:
            features = ranks.concatenate(torch.cat([torch.empty(0, num_features), *self._features]))
        if self._keeps_logits:
            logits = ranks.concatenate(torch.cat([torch.empty(0, num_logits), *self._logits]))
        if sums.count < 2:
            raise InputError(TOO_FEW)
        moments = sums.moments()
        if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
            raise InputError(f"extractor {self._extractor.name}: its features are not finite")
        return FeatureSet(moments, features, logits)


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

    Raises:
        InputError: A side has too few images for a metric, or the features' dimensions differ.
    """
    ours, theirs = len(generated.moments.mean), len(reference.moments.mean)
    if ours != theirs:
        raise InputError(f"the samples have {ours} features, the reference has {theirs}")
    names = _names(distance_name)
    values: dict[str, float] = {}
    for metric in metrics:
        _check_count([metric], generated.moments.num_images)
        if metric != "is":
            _check_count([metric], reference.moments.num_images)
        values |= zip(names[metric], _COMPUTE[metric](generated, reference), strict=True)
    return values


def metric_names(metrics: Iterable[Metric], distance_name: str, num_images: int) -> list[str]:
    """Name what `evaluate` gives, in its order, with the number of images: fid_2k, kid_2k, ..."""
    return list(metric_titles(metrics, distance_name, num_images).values())


def metric_titles(metrics: Iterable[Metric], distance_name: str, num_images: int) -> dict[str, str]:
    """Give what `metric_names` gives by the names that `evaluate` uses: {"fid": "fid_2k"}."""
    thousands, rest = divmod(num_images, 1000)
    count = f"{thousands}k" if rest == 0 else str(num_images)
    names = _names(distance_name)
    return {name: f"{name}_{count}" for metric in metrics for name in names[metric]}


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


def _check_count(metrics: Iterable[Metric], num_images: int) -> None:
    for metric in metrics:
        if num_images < _LEAST_IMAGES[metric]:
            raise InputError(
                f"{num_images} images are too few for the metric {metric}: it needs at least "
                f"{_LEAST_IMAGES[metric]} on each side"
            )


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
