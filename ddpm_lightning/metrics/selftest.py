"""Does this installation compute the metrics right? Known answers, and torch-fidelity's."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_lightning.metrics.features import Extractor, make_extractor
from ddpm_lightning.metrics.frechet import Moments, MomentSums, frechet_distance
from ddpm_lightning.metrics.judge import METRICS, Collector, FeatureSet, Ranks, evaluate

NUM_IMAGES = 64
IMAGE_SHAPE = (3, 16, 16)
BATCH_SIZE = 24
NUM_FEATURES = 64  # of the Gaussians
SHARES = (30, 0, 34)

Result = TypeVar("Result")
Finding = tuple[str, float, float]  # what was compared, how far it is off, how far it may be


def run(say: Callable[[str], None]) -> int:
    """Check the metrics; it takes seconds, and no network.

    Args:
        say: Is given a line for each finding, and one about all of them.

    Returns:
        0 where everything is right, else 1.
    """
    num_found = num_wrong = 0
    for check in (_gaussians, _same_set, _shares, _torch_fidelity):
        try:
            for what, error, most in check():
                is_right = error <= most  # not where it is nan
                verdict = "ok   " if is_right else "WRONG"
                say(f"{verdict} {what}: off by {error:.1e}, at most {most:.0e}")
                num_found += 1
                num_wrong += not is_right
        except Exception as error:  # whatever a broken installation may do
            say(f"WRONG {check.__name__.strip('_')}: {type(error).__name__}: {error}")
            num_found += 1
            num_wrong += 1
    say(
        f"{num_wrong} of {num_found} checks failed: do not trust numbers of this installation"
        if num_wrong
        else f"all {num_found} checks passed"
    )
    return int(num_wrong > 0)


class ThreadRanks:
    """Stands for one of several processes, in a thread (see `judge.Ranks`)."""

    def __init__(self, rank: int, barrier: Barrier, slots: list[Tensor]) -> None:
        self._rank = rank
        self._barrier = barrier
        self._slots = slots

    @classmethod
    def gather(cls, tasks: Sequence[Callable[[Ranks], Result]]) -> list[Result]:
        """Run a task for each rank, and give their results in the ranks' order."""
        barrier, slots = Barrier(len(tasks), timeout=60), [torch.empty(0)] * len(tasks)
        with ThreadPoolExecutor(len(tasks)) as pool:
            started = [
                pool.submit(task, cls(rank, barrier, slots)) for rank, task in enumerate(tasks)
            ]
            return [future.result() for future in started]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks."""
        return torch.stack(self._exchange(tensor)).sum(dim=0)

    def concatenate(self, rows: Tensor) -> Tensor:
        """Concatenate [N_rank, D] in the order of the ranks."""
        return torch.cat(self._exchange(rows))

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._slots[self._rank] = tensor
        self._barrier.wait()
        tensors = list(self._slots)
        self._barrier.wait()
        return tensors


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _pictures(seed: int) -> Tensor:
    """Random pictures, by every other seed less bright, uint8 [N, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    size = (NUM_IMAGES, *IMAGE_SHAPE)
    return torch.randint(256 - 24 * (seed % 2), size, generator=generator, dtype=torch.uint8)


def _collect(extractor: Extractor, *shares: Tensor) -> FeatureSet:
    return _collector(extractor, *shares).finish()


def _collector(extractor: Extractor, *shares: Tensor) -> Collector:
    collector = Collector(extractor, METRICS)
    for images in shares:
        for start in range(0, len(images), BATCH_SIZE):
            collector.add(images[start : start + BATCH_SIZE])
    return collector


def _distance(a: FeatureSet, b: FeatureSet) -> float:
    return frechet_distance(a.moments, b.moments)


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-6)  # a spread, or a share, may be 0


def _gaussians() -> Iterator[Finding]:
    """A, and B = C A C with C symmetric, have the distance |m_a - m_b|^2 + tr(A + B - 2 A C)."""
    size = (NUM_FEATURES, 3 * NUM_FEATURES)
    a, c = (x @ x.T / size[1] for x in (_normal(*size, seed=seed) for seed in (1, 2)))
    b = c @ a @ c
    mean_a, mean_b = _normal(2, NUM_FEATURES, seed=3)
    known = float(((mean_a - mean_b) ** 2).sum() + (a + b - 2 * a @ c).trace())
    ours = frechet_distance(Moments(2, mean_a, a), Moments(2, mean_b, b))
    yield "distance of two known Gaussians, relative", abs(ours / known - 1), 1e-12
    features = _normal(500, NUM_FEATURES, seed=4) + 100
    sums = MomentSums(NUM_FEATURES, features.device)
    for batch in features.tensor_split(7):
        sums.add(batch)
    error = float((sums.moments().covariance - features.T.cov()).abs().max())
    yield "covariance summed up in batches", error, 1e-12


def _same_set() -> Iterator[Finding]:
    images = _collect(make_extractor("efficientnet-lite0"), _pictures(seed=0))
    traces = 2 * float(images.moments.covariance.trace())
    error = abs(_distance(images, images)) / traces
    yield "distance of a set to itself, in parts of the traces", error, 1e-12


def _shares() -> Iterator[Finding]:
    extractor = make_extractor("efficientnet-lite0")
    reference = _collect(extractor, _pictures(seed=1))
    shares = _pictures(seed=0).split(SHARES)  # type: ignore[no-untyped-call]
    collectors = [_collector(extractor, share) for share in shares]
    shared = ThreadRanks.gather([collector.finish for collector in collectors])
    # In the same batches: with others, float32 features round otherwise, which KID magnifies.
    whole = evaluate(_collect(extractor, *shares), reference, METRICS, "fd")
    each = [evaluate(part, reference, METRICS, "fd") for part in shared]
    error = max(_relative(values["fd"], whole["fd"]) for values in each)
    yield f"Frechet distance from shares of {SHARES}, relative", error, 1e-6
    # float32; a subset of all images has no spread but rounding
    names = whole.keys() - {"fd", "kid_std"}
    error = max(_relative(values[name], whole[name]) for values in each for name in names)
    yield f"the other metrics from shares of {SHARES}, relative", error, 1e-5


def _torch_fidelity() -> Iterator[Finding]:
    """The same images, through torch-fidelity from end to end."""
    import torch_fidelity

    extractor = make_extractor("efficientnet-lite0")
    generated, reference = _pictures(seed=0), _pictures(seed=1)
    sides = [_collect(extractor, images) for images in (generated, reference)]
    ours = evaluate(sides[0], sides[1], METRICS, "fd")
    theirs = torch_fidelity.calculate_metrics(
        input1=TensorDataset(generated),
        input2=TensorDataset(reference),
        feature_extractor=register(extractor),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=NUM_IMAGES,
        batch_size=BATCH_SIZE,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    traces = sum(float(side.moments.covariance.trace()) for side in sides)
    error = abs(ours["fd"] - theirs["frechet_inception_distance"]) / traces
    yield "Frechet distance and torch-fidelity's, in parts of the traces", error, 1e-6
    for name, key in {
        "kid": "kernel_inception_distance_mean",
        "is": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }.items():
        yield f"{name} and torch-fidelity's, relative", _relative(ours[name], theirs[key]), 1e-6


class TensorDataset(Dataset[Tensor]):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


def register(extractor: Extractor) -> str:
    """Make an extractor known to torch-fidelity under a name of its own, and give that."""
    from torch_fidelity import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Theirs(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **options: object) -> None:
            super().__init__(name, features_list)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found = extractor(images)._asdict()
            return tuple(found[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

    name = f"ddpm_lightning {extractor.name}"
    FEATURE_EXTRACTORS_REGISTRY[name] = Theirs
    return name
