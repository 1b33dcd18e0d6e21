"""Feature extractors for tests: a small one, and Inception with random weights in its format."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning.checkpoints import file_sha256
from ddpm_lightning.data.batches import ImageSet
from ddpm_lightning.data.cache import CachedImages
from ddpm_lightning.metrics.features import Extractor, make_extractor

NUM_FEATURES = 24


class Small(nn.Module):
    """A user's network: a random layer on 4 x 4 of the pixels."""

    num_features = NUM_FEATURES  # torchmetrics asks for it

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, NUM_FEATURES)
        generator = torch.Generator().manual_seed(7)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        x = nn.functional.interpolate(images.float(), 4).flatten(1)  # picks pixels
        features: Tensor = self.layer(x / 64 - 2).relu()
        return features


class WithoutWeights(nn.Module):
    """Also an extractor: the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean(dim=(2, 3))


class WrongShape(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class WrongNumber(WithoutWeights):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:1]


class WrongType(WithoutWeights):
    def forward(self, images: Tensor) -> Tensor:
        return (super().forward(images),)  # type: ignore[return-value]


class NotFinite(WithoutWeights):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0


class NeedsArguments(WithoutWeights):
    def __init__(self, size: int) -> None:
        super().__init__()


def small() -> Extractor:
    return make_extractor(f"{__name__}.{Small.__name__}")


def images(num_images: int, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """Random images of at most 16 x 16 patches; a little darker for odd seeds."""
    generator = torch.Generator().manual_seed(seed)
    patches = min(size, 16)
    levels = torch.rand(num_images, channels, patches, patches, generator=generator)
    levels = nn.functional.interpolate(levels, size, mode="bilinear")
    return (levels * (256 - 10 * (seed % 2))).to(torch.uint8)


def write_inception(path: Path, old_format: bool) -> str:
    """Write random weights as Inception's are written, and give their SHA-256."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if value.ndim == 4:  # of a convolution: keeps the scale of what passes through
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=generator)
        elif value.ndim == 2:
            value.normal_(std=0.05, generator=generator)
        elif name.endswith(("weight", "running_var")):
            value.uniform_(0.8, 1.2, generator=generator)
        elif value.ndim == 1:
            value.normal_(std=0.1, generator=generator)
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not old_format)
    return file_sha256(path)


def image_set(folder: Path, pixels: Tensor) -> ImageSet:
    """Images as a data module has them, decoded in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = pixels.numpy().tobytes()
    (folder / "images.bin").write_bytes(data)
    num_images, channels, height, width = pixels.shape
    shape = (num_images, channels, height, width)
    return ImageSet(CachedImages(folder, shape, hashlib.sha256(data).hexdigest(), 0, ()))
