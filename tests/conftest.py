"""What several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm_lightning.diffusion.process import LEARNED_VARIANCES, Variance

# huggingface_hub reads it once, when it is imported: no test may ask the real one
os.environ["HF_HUB_OFFLINE"] = "1"

GOLDEN = Path(__file__).parent / "golden.npz"

# No batch size that the tests use divides either of them.
NUM_TRAIN = 30
NUM_VAL = 7


class Golden:
    """The numbers of golden.npz as float64 tensors; golden.md beside it explains them."""

    def __init__(self) -> None:
        with np.load(GOLDEN) as arrays:
            self._arrays: dict[str, NDArray[np.float64]] = dict(arrays)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[key])

    @staticmethod
    def net(x: Tensor, t: Tensor) -> Tensor:
        """The analytic network that the reference numbers were made with."""
        t = t.to(x.dtype).reshape(-1, 1, 1, 1)
        return 0.3 * x * torch.cos(t / 1000) + 0.1 * torch.sin(t / 100)

    @classmethod
    def learned_net(cls, x: Tensor, t: Tensor) -> Tensor:
        """The same where the variance is learned, too."""
        return torch.cat([cls.net(x, t), x.tanh()], dim=1)

    @classmethod
    def net_for(cls, variance: Variance) -> Callable[[Tensor, Tensor], Tensor]:
        """The network that gives what goes with a variance."""
        return cls.learned_net if variance in LEARNED_VARIANCES else cls.net

    def chain_noise(self, index: int) -> Tensor:
        """The noise that the reference chains use at one index."""
        angle = torch.tensor(float(index), dtype=torch.float64)
        return self["noise_2"] * torch.cos(angle) + self["noise"] * torch.sin(angle)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8 x 8 grey images with the splits train and val."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    generator = np.random.default_rng(0)
    for split, num_images in {"train": NUM_TRAIN, "val": NUM_VAL}.items():
        (folder / split).mkdir(parents=True)
        for index in range(num_images):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def labelled(pictures: Path) -> Path:
    """The same in two folders, one for each class, of dark and of bright images."""
    folder = pictures.parent / "labelled"
    for file in sorted(pictures.rglob("*.png")):
        number = int(file.stem) % 2
        path = folder / file.parent.name / ("dark", "light")[number] / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            Image.fromarray(np.asarray(image) // 2 + np.uint8(127 * number)).save(path)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny networks are no faster on two threads, which wait for each other on busy cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
