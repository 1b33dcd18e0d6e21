"""Feature extractors, what is gathered from them, and the lines for what cannot be."""

import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

from ddpm_lightning.checkpoints import file_sha256
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    Extractor,
    Features,
    make_extractor,
    module_sha256,
)
from ddpm_lightning.metrics.judge import (
    METRICS,
    Collector,
    FeatureSet,
    Metric,
    Ranks,
    check_metrics,
    evaluate,
    metric_names,
    warnings_of,
)
from ddpm_lightning.metrics.selftest import ThreadRanks
from tests import extractors
from tests.extractors import images, small, write_inception
from tests.malicious import Malicious

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

REAL = INCEPTION_SHA256


def of_user(name: str) -> Extractor:
    return make_extractor(f"{extractors.__name__}.{name}")


def collect(
    extractor: Extractor, x: Tensor, metrics: tuple[Metric, ...] = ("fd",), batch_size: int = 16
) -> FeatureSet:
    collector = Collector(extractor, metrics)
    for start in range(0, len(x), batch_size):
        collector.add(x[start : start + batch_size])
    return collector.finish()


def told(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- what there is -------------------------------------------------------------------------------


HEAVY = {"torch_fidelity", "torchvision", "sklearn", "matplotlib", "scipy", "datasets"}


def test_importing_it_imports_nothing_heavy() -> None:
    """Lightning itself imports some of them, by way of torchmetrics; nothing of ours adds to it."""
    program = (
        "import sys\n"
        "from ddpm_lightning.metrics import features, judge, record, reference, selftest\n"
        f"assert not {HEAVY} & sys.modules.keys(), 'metrics'\n"
        "import lightning.pytorch\n"
        f"known = {HEAVY} & sys.modules.keys()\n"
        "import ddpm_lightning.callbacks\n"
        f"print({HEAVY} & sys.modules.keys() - known)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "set()\n", ran.stderr


def test_efficientnet_needs_no_network_and_says_what_it_is() -> None:
    extractor = make_extractor("efficientnet-lite0")
    assert extractor.distance_name == "fd_efficientnet-lite0"
    assert extractor.protocol.keys() == {"extractor", "layer", "resizer", "weights_sha256"}
    assert extractor.protocol["extractor"] == "efficientnet-lite0@96x96"
    assert len(extractor.protocol["weights_sha256"]) == 64
    assert not extractor.module.training
    assert not any(p.requires_grad for p in extractor.module.parameters())
    for size in (1, 8, 33, 300):
        features, logits = extractor(images(2, size))
        assert features.shape == (2, 1280)
        assert features.dtype == torch.float32
        assert logits is not None
        assert logits.shape == (2, 1000)


def test_grey_is_repeated() -> None:
    for extractor in (make_extractor("efficientnet-lite0"), small()):
        grey = images(3, 16, channels=1)
        ours, theirs = extractor(grey), extractor(grey.repeat(1, 3, 1, 1))
        assert torch.equal(ours.features, theirs.features)


@pytest.mark.parametrize("name", ["efficientnet-lite0", f"{extractors.__name__}.Small"])
def test_making_one_leaves_the_random_state_alone(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_extractor(name)
    assert torch.equal(torch.rand(3), expected)


def test_a_users_module() -> None:
    extractor = small()
    assert extractor.distance_name == "fd_Small"
    assert extractor.protocol == {
        "extractor": "tests.extractors.Small",
        "layer": "output",
        "resizer": "its own",
        "weights_sha256": module_sha256(extractors.Small()),
        "source_sha256": file_sha256(extractors.__file__),
    }
    features, logits = extractor(images(5))
    assert features.shape == (5, extractors.NUM_FEATURES)
    assert logits is None
    assert collect(of_user("WithoutWeights"), images(5)).moments.mean.shape == (3,)


def test_weights_are_hashed_by_name_type_shape_and_value() -> None:
    net = torch.nn.Linear(2, 3)
    hashes = {module_sha256(net)}
    assert module_sha256(net) in hashes
    with torch.no_grad():
        net.bias[0] += 1
    hashes.add(module_sha256(net))
    hashes.add(module_sha256(net.bfloat16()))
    hashes.add(module_sha256(torch.nn.Sequential(net)))
    net.register_buffer("flag", torch.tensor(True))
    hashes.add(module_sha256(net))
    assert len(hashes) == 5


# --- Inception -----------------------------------------------------------------------------------


@pytest.mark.parametrize("old_format", [True, False])
def test_inception_from_a_file(old_format: bool, tmp_path: Path) -> None:
    """The real file is from before torch 1.6, in a format that cannot be mapped."""
    path = tmp_path / "weights.pth"
    sha256 = write_inception(path, old_format)
    extractor = make_extractor("inception", path, sha256)
    assert extractor.distance_name == "fid"
    assert extractor.has_classes
    assert extractor.protocol == {
        "extractor": "inception-v3-compat",
        "layer": "2048",
        "resizer": "bilinear to 299x299 as in TensorFlow 1",
        "weights_sha256": sha256,
    }
    features, logits = extractor(images(2, channels=1))
    assert features.shape == (2, 2048)
    assert logits is not None
    assert logits.shape == (2, 1008)


def test_inception_with_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"other weights")
    with pytest.raises(InputError) as error:
        make_extractor("inception", path)
    assert file_sha256(path) in told(error)
    assert REAL in told(error)
    with pytest.raises(InputError, match="no such file of Inception weights"):
        make_extractor("inception", tmp_path / "none.pth")


@pytest.mark.parametrize("by_torch", [True, False])
def test_weights_are_not_executed(by_torch: bool, tmp_path: Path) -> None:
    """Not even where the hash is right."""
    path, victim = tmp_path / "weights.pth", tmp_path / "victim"
    if by_torch:
        torch.save({"weights": Malicious(victim)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(InputError, match="not a file of weights") as error:
        make_extractor("inception", path, file_sha256(path))
    told(error)
    assert not victim.exists()


def test_inception_without_network_names_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError) as error:
        make_extractor("inception")
    text = told(error)
    for words in ("no network", str(tmp_path), INCEPTION_FILE, "extractor_weights"):
        assert words in text
    assert "efficientnet-lite0" in text
    # what is in the cache is hashed, too
    (tmp_path / "checkpoints" / INCEPTION_FILE).write_bytes(b"half of it")
    with pytest.raises(InputError, match="remove it, so that it is downloaded again"):
        make_extractor("inception")


def test_another_of_torch_fidelitys_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import feature_extractor_vgg16 as theirs

    def offline(*args: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", offline)
    with pytest.raises(InputError, match="extractor vgg16: its weights cannot be had") as error:
        make_extractor("vgg16")
    assert "efficientnet-lite0" in told(error)


# --- bad extractors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inceptoin", "inception-v3-compat", ""])
def test_unknown_extractors_are_refused_with_the_known(name: str) -> None:
    """inception-v3-compat would be Inception with weights that nobody checked."""
    with pytest.raises(InputError, match=f"no extractor {name}; there are inception, ") as error:
        make_extractor(name)
    assert "dinov2-vit-b-14" in told(error)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.Net", "nowhere.Net"),
        ("tests.extractors.Nothing", "Nothing"),
        ("tests.extractors.images", "not a torch.nn.Module"),
        ("tests.extractors.NeedsArguments", "is made without arguments"),
    ],
)
def test_bad_class_paths_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make_extractor(name)
    told(error)


def test_a_weights_file_is_inceptions() -> None:
    with pytest.raises(InputError, match="only inception takes a weights file"):
        make_extractor("efficientnet-lite0", "weights.pth")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WrongShape", r"gives \[4, 3, 8, 8\] for 4 images"),
        ("WrongNumber", r"gives \[1, 3\] for 4 images"),
        ("WrongType", "gives tuple for 4 images"),
        ("NotFinite", "its features are not finite"),
    ],
)
def test_bad_features_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        collect(of_user(name), images(4))
    told(error)


# --- what is gathered ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [0, 1])
def test_fewer_than_two_images_are_refused(num_images: int) -> None:
    with pytest.raises(InputError, match="needs at least two images on each side"):
        collect(small(), images(num_images))


@pytest.mark.parametrize("metrics", [("fd",), ("kid",), ("is", "prc"), METRICS])
def test_only_what_is_needed_is_kept(metrics: tuple[Metric, ...]) -> None:
    found = collect(make_extractor("efficientnet-lite0"), images(5), metrics)
    assert (found.features is not None) == bool({"kid", "prc"} & set(metrics))
    assert (found.logits is not None) == ("is" in metrics)
    assert found.moments.num_images == 5


def test_batches_do_not_matter() -> None:
    x, extractor = images(37, 16), make_extractor("efficientnet-lite0")
    reference = collect(extractor, images(40, 16, seed=1), METRICS)
    whole = evaluate(collect(extractor, x, METRICS), reference, METRICS, "fd")
    for batch_size in (1, 5, 36):
        values = evaluate(collect(extractor, x, METRICS, batch_size), reference, METRICS, "fd")
        for name in ("fd", "is", "precision", "recall"):
            assert values[name] == pytest.approx(whole[name], rel=1e-6), name


@pytest.mark.parametrize("sizes", [[40], [21, 19], [13, 13, 14], [40, 0], [0, 39, 1]])
def test_ranks_do_not_matter(sizes: list[int]) -> None:
    x, extractor = images(40), make_extractor("efficientnet-lite0")
    cached = extractor(x)  # identical features: what is left is the arithmetic

    def look_up(pixels: Tensor) -> Features:
        rows = [int((x == image).flatten(1).all(dim=1).nonzero()) for image in pixels]
        logits = cached.logits
        assert logits is not None
        return Features(cached.features[rows], logits[rows])

    double = Extractor("double", "fd", {}, torch.nn.Identity(), True, look_up)
    whole = collect(double, x, METRICS)
    reference = collect(extractor, images(30, seed=1), METRICS)
    expected = evaluate(whole, reference, METRICS, "fd")

    def task(share: Tensor, ranks: Ranks) -> FeatureSet:
        collector = Collector(double, METRICS)
        for start in range(0, len(share), 16):
            collector.add(share[start : start + 16])
        return collector.finish(ranks)

    shares = x.split(sizes)  # type: ignore[no-untyped-call]
    for found in ThreadRanks.gather([partial(task, share) for share in shares]):
        assert found.features is not None
        assert whole.features is not None
        assert torch.equal(found.features, whole.features)  # in the order of the seeds
        values = evaluate(found, reference, METRICS, "fd")
        assert values == pytest.approx(expected, rel=1e-9)


def test_ranks_without_any_images_are_refused() -> None:
    def task(ranks: Ranks) -> FeatureSet:
        return Collector(small(), ["fd"]).finish(ranks)

    with pytest.raises(InputError, match="at least two images"):
        ThreadRanks.gather([task, task])


# --- metrics -------------------------------------------------------------------------------------


def test_names_say_the_extractor_and_the_number_of_images() -> None:
    assert metric_names(METRICS, "fid", 50_000) == [
        *("fid_50k", "kid_50k", "kid_std_50k"),
        *("is_50k", "is_std_50k", "precision_50k", "recall_50k"),
    ]
    assert metric_names(["fd", "kid", "prc"], "fd_Small", 1_500) == [
        *("fd_Small_1500", "kd_Small_1500", "kd_Small_std_1500"),
        *("precision_Small_1500", "recall_Small_1500"),
    ]


def test_classes_are_needed_for_the_inception_score() -> None:
    check_metrics(["fd", "kid", "prc"], small())
    check_metrics(METRICS, make_extractor("efficientnet-lite0"))
    with pytest.raises(InputError, match="has no classes, which the Inception Score needs"):
        check_metrics(["fd", "is"], small())


@pytest.mark.parametrize(("metric", "least"), [("fd", 2), ("kid", 2), ("is", 10), ("prc", 4)])
def test_too_few_images_for_a_metric(metric: Metric, least: int) -> None:
    extractor = make_extractor("efficientnet-lite0")
    check_metrics([metric], extractor, least)
    with pytest.raises(InputError, match=f"{least - 1} images are too few for the metric"):
        check_metrics([metric], extractor, least - 1)
    enough, few = (collect(extractor, images(n), METRICS) for n in (least, max(least - 1, 2)))
    assert all(map(math.isfinite, evaluate(enough, enough, [metric], "fd").values()))
    if least > 2:
        with pytest.raises(InputError, match="too few for the metric"):
            evaluate(few, enough, [metric], "fd")
        if metric != "is":
            with pytest.raises(InputError, match="too few for the metric"):
                evaluate(enough, few, [metric], "fd")


def test_other_dimensions_are_refused() -> None:
    one, other = collect(small(), images(4)), collect(of_user("WithoutWeights"), images(4))
    with pytest.raises(InputError, match="the samples have 24 features, the reference has 3"):
        evaluate(one, other, ["fd"], "fd")


def test_few_images_bring_a_warning() -> None:
    few, enough = (collect(small(), images(n)) for n in (24, 25))
    assert warnings_of(enough, enough) == []
    assert [text.split(":")[0] for text in warnings_of(few, enough)] == ["samples"]
    assert [text.split(":")[0] for text in warnings_of(few, few)] == ["samples", "reference"]
    assert "24 images for 24 features" in warnings_of(few, enough)[0]


def test_what_a_users_network_does_is_in_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    protocols = []
    for factor in (1, 2):
        name = f"own{factor}"
        (tmp_path / f"{name}.py").write_text(
            "import torch\n\n\nclass Net(torch.nn.Module):\n"
            f"    def forward(self, x):\n        return {factor} * x.float().mean((2, 3))\n"
        )
        protocols.append(make_extractor(f"{name}.Net").protocol)
    assert protocols[0]["weights_sha256"] == protocols[1]["weights_sha256"]
    assert protocols[0]["source_sha256"] != protocols[1]["source_sha256"]
