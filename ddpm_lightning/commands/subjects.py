"""What can be judged: checkpoints, one by one or by the run, and images that lie on disk."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_lightning.checkpoints import Weights, file_sha256, load_checkpoint, select_weights
from ddpm_lightning.commands.sample import GIF_NAME
from ddpm_lightning.commands.told import Guide
from ddpm_lightning.data.batches import ImageSet
from ddpm_lightning.data.cache import default_cache_dir, open_images
from ddpm_lightning.data.image_folder import SUFFIXES, list_files, open_image_folder
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import CacheError, InputError
from ddpm_lightning.images import Pixels
from ddpm_lightning.module import DDPM
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import Guidance, Sampler

Shape = tuple[int, int, int]
"""(C, H, W) of an image."""

# What `sample` writes beside its images; settings.json tells that it was `sample`.
SAMPLE_SETTINGS = "settings.json"
SAMPLE_EXTRAS = ("grid.png", GIF_NAME)


class Images(Protocol):
    """Some images that lie on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: NDArray[np.int64], /) -> Pixels: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked at.

    Attributes:
        path: The file.
        sha256: Of its content.
        step: The optimizer step that it was written at.
        run: The run in whose folder it lies, if any.
        image_shape: What it samples.
        data: What it says of the images that it was trained on; older ones say nothing.
        process: What it was trained on.
        dtype: Of its weights, such as float32.
        num_classes: How many classes its network is told; 0 for none.
    """

    path: Path
    sha256: str
    step: int
    run: Run | None
    image_shape: Shape
    data: dict[str, Any] = field(compare=False)
    process: Process = field(compare=False)
    dtype: str
    num_classes: int = 0


@dataclass(frozen=True)
class StoredImages:
    """Images that lie on disk.

    Attributes:
        path: The folder, or the .npz file.
        sha256: Of the pixels, or of the file.
        image_shape: Of each.
        images: The images.
        settings: What `sample` noted about a folder that it wrote; None where it is another's.
    """

    path: Path
    sha256: str
    image_shape: Shape
    images: Images = field(compare=False)
    settings: dict[str, Any] | None = field(default=None, compare=False)


Subject = Checkpoint | StoredImages


class CheckpointReader:
    """Looks at checkpoints, and refuses what could not be judged.

    Args:
        weights: Which weights each must have.
        samplers: What each must be able to sample with.
        guidances: How strongly each must be able to be guided.
        guide: What must be able to guide each.
    """

    def __init__(
        self,
        weights: Sequence[Weights],
        samplers: Sequence[Sampler],
        guidances: Sequence[Guidance | None] = (),
        guide: Guide | None = None,
    ) -> None:
        self._weights = weights
        self._samplers = samplers
        self._guidances = guidances
        self._guide = guide
        self._models: dict[str, DDPM] = {}

    def __call__(self, path: Path) -> Checkpoint:
        """Look at one.

        Raises:
            InputError: It is none, is damaged, lacks the weights, or has not the timesteps
                asked for.
        """
        content = load_checkpoint(path)
        for weights in self._weights:
            select_weights(content, weights, path)
        # those of one run have the same model, which need not be built again
        key = json.dumps(content["hyper_parameters"], sort_keys=True, default=str)
        if key not in self._models:
            self._models[key] = self._build(path)
        model = self._models[key]
        assert model.image_shape is not None
        channels, height, width = model.image_shape
        data = content.get("ImageDataModule")
        return Checkpoint(
            path,
            file_sha256(path),
            int(content["global_step"]),
            run_of(path),
            (channels, height, width),
            data if isinstance(data, dict) else {},
            model.process,
            str(next(model.net.parameters()).dtype).removeprefix("torch."),
            model.num_classes,
        )

    def _build(self, path: Path) -> DDPM:
        model = DDPM.from_checkpoint(path, self._weights[0])
        if model.image_shape is None:
            raise InputError(f"{path}: does not say what shape its images have")
        for sampler in self._samplers:
            sampler.respace(model.process)  # refuses timesteps that there are not
        if self._guide is not None:
            for weights in self._weights:
                self._guide.load(weights, model)  # refuses models of another kind
        else:
            for guidance in self._guidances:
                model.check_guidance(guidance)
        return model


def run_of(checkpoint: Path) -> Run | None:
    """Give the run in whose folder a checkpoint lies."""
    folder = checkpoint.absolute().parent
    root, here = folder.parent, Path.cwd()
    run = Run(root.relative_to(here) if root.is_relative_to(here) else root)
    return run if folder.name == "checkpoints" and run.config.is_file() else None


def kept_checkpoints(run: Run) -> list[Path]:
    """Give a run's step=N.ckpt in the order of the steps."""
    steps = {
        int(match[1]): path
        for path in run.checkpoints.glob("step=*.ckpt")
        if (match := re.fullmatch(r"step=(\d+)", path.stem))
    }
    return [steps[step] for step in sorted(steps)]


def find_subjects(words: Sequence[str], read: CheckpointReader) -> list[Subject]:
    """Find what the words of a command line name.

    Args:
        words: Checkpoints, run folders, folders of images and .npz files.
        read: Looks at checkpoints.

    Raises:
        InputError: One is nothing of the kind, or the images are not of one shape.
    """
    subjects: list[Subject] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir() and (path / "checkpoints").is_dir():
            files = kept_checkpoints(Run(path))
            if not files:
                raise InputError(f"{path}: the run has no checkpoints/step=N.ckpt")
            subjects += map(read, files)
        elif path.is_dir():
            subjects.append(_open_folder(path))
        elif path.suffix == ".npz" and path.is_file():
            subjects.append(_open_npz(path))
        elif path.is_file():
            subjects.append(read(path))
        else:
            raise InputError(
                f"{path}: no such file or folder; a subject is a checkpoint, a run's folder, a "
                "folder of images or an .npz file of images"
            )
    first = subjects[0]
    for subject in subjects:
        check_shape(subject.path, subject.image_shape, str(first.path), first.image_shape)
    return subjects


def check_shape(path: Path, shape: Shape, other: str, other_shape: Sequence[int]) -> None:
    """Refuse to compare images of two shapes.

    An extractor would resize both, but by other factors: the distance would measure that.

    Raises:
        InputError: They differ.
    """
    if tuple(shape) != tuple(other_shape):
        ours, theirs = ("x".join(map(str, size)) for size in (shape, other_shape))
        raise InputError(
            f"{path}: its images are {ours} (channels x height x width), but those of {other} are "
            f"{theirs}; only images of one shape are compared"
        )


def without_remedy(error: InputError) -> str:
    """Give the first half of a message about --data.source: the other half names its options.

    A message about the cache stays whole.
    """
    if isinstance(error, CacheError):
        return str(error)
    return str(error).partition("; ")[0].replace("--data.source ", "")


def _open_folder(path: Path) -> StoredImages:
    settings = None
    files = list_files(path)
    if (path / SAMPLE_SETTINGS).is_file():
        settings = _read_settings(path / SAMPLE_SETTINGS)
        files = [file for file in files if file.path not in SAMPLE_EXTRAS]
    if not any(file.path.lower().endswith(SUFFIXES) for file in files):
        raise InputError(
            f"{path}: neither a run's folder (it has no checkpoints/) nor one of images (none in "
            f"it ends in {', '.join(SUFFIXES)})"
        )
    try:
        source = open_image_folder(str(path), path, files)
        cached = open_images(source, "train", None, None, "stop", default_cache_dir())
    except InputError as error:
        raise InputError(without_remedy(error)) from error
    return StoredImages(path, cached.sha256, cached.shape[1:], ImageSet(cached), settings)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _open_npz(path: Path) -> StoredImages:
    images = NpzImages(path)
    _, channels, height, width = images.pixels.shape
    return StoredImages(path, file_sha256(path), (channels, height, width), images)


class NpzImages:
    """The images of an .npz file; pickled as a path.

    Args:
        path: Holds arr_0, or one array of any name: uint8 [N, H, W, C], or [N, C, H, W] where the
            last axis cannot be the colours'.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: NDArray[np.int64]) -> Pixels:
        """Give the images at `indices`, uint8 [n, C, H, W]."""
        return np.ascontiguousarray(self.pixels[indices])

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    @cached_property
    def pixels(self) -> Pixels:
        """All of them, uint8 [N, C, H, W].

        Raises:
            InputError: The file holds no images.
        """
        try:
            with np.load(self._path, allow_pickle=False) as file:
                if {"mean", "covariance"} <= set(file.files):
                    raise InputError(
                        f"{self._path}: statistics, not images; give it as --reference"
                    )
                array = file["arr_0" if "arr_0" in file.files else file.files[0]]
        except InputError:
            raise
        except Exception as error:  # the reader stumbles over a foreign file in any way it likes
            raise InputError(f"{self._path}: not an .npz file of images ({error})") from error
        if array.dtype != np.uint8 or array.ndim != 4:
            raise InputError(
                f"{self._path}: holds {array.dtype} {list(array.shape)}; images are uint8 "
                "[N, H, W, C]"
            )
        if array.shape[3] not in (1, 3) and array.shape[1] not in (1, 3):
            raise InputError(
                f"{self._path}: holds uint8 {list(array.shape)}; images have 1 or 3 channels, "
                "[N, H, W, C]"
            )
        pixels: Pixels = array.transpose(0, 3, 1, 2) if array.shape[3] in (1, 3) else array
        return pixels
