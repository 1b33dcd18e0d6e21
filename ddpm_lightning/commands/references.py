"""What samples are compared with: a run's training images, other images, or saved statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_lightning.checkpoints import file_sha256
from ddpm_lightning.commands.run_config import RunConfig
from ddpm_lightning.commands.subjects import Checkpoint, Subject, check_shape, without_remedy
from ddpm_lightning.data.batches import Images
from ddpm_lightning.data.cache import Channels
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.features import Extractor
from ddpm_lightning.metrics.judge import Metric, check_metrics
from ddpm_lightning.metrics.reference import (
    Reference,
    describe_reference,
    load_reference,
    reference_of,
)

GIVE = "say what to compare with by --reference (a data set, a folder, or saved statistics)"


@dataclass(frozen=True)
class ReferenceChoice:
    """A reference that has been looked at; its features may still have to be computed.

    Attributes:
        protocol: The protocol's fields that name it.
        load: Gives its statistics; several processes may call it at once.
        file: The file of statistics and its SHA-256, where it is one.
    """

    protocol: dict[str, Any]
    load: Callable[[], Reference]
    file: dict[str, str] | None = None


def choose_reference(
    reference: str | None,
    subjects: Sequence[Subject],
    extractor: Extractor,
    metrics: list[Metric],
    batch_size: int,
) -> ReferenceChoice:
    """Find the reference and see that it fits the subjects.

    Args:
        reference: An .npz file of statistics, or a data set as --data.source takes it, whose train
            split is brought to the subjects' size and channels; the images that the subjects'
            run trains on when None.
        subjects: What is judged, all of one shape.
        extractor: Whose features are compared.
        metrics: What they are for.
        batch_size: Images at a time.

    Raises:
        InputError: There is no such reference, or it does not fit.
    """
    if reference is not None and reference.lower().endswith(".npz"):
        return _statistics(Path(reference).expanduser(), subjects[0], extractor, metrics)
    data = open_reference(reference, subjects)
    images = data.train_images
    try:
        check_metrics([metric for metric in metrics if metric != "is"], extractor, len(images))
    except InputError as error:
        raise InputError(f"the reference {data.source}: {error}") from error
    return ReferenceChoice(
        describe_reference(images, data.source, extractor),
        lambda: reference_of(images, data.source, extractor, metrics, data.cache_dir, batch_size),
    )


def open_reference(
    reference: str | None,
    subjects: Sequence[Subject],
    option: str = "--reference",
    give: str = GIVE,
) -> ImageDataModule:
    """Open the images that subjects are compared with: its `train_images`.

    Args:
        reference: A data set as --data.source takes it; what the subjects' run trains on when None.
        subjects: All of one shape.
        option: The option that names it.
        give: What to do where it is not known, for messages.

    Raises:
        InputError: There are no such images, of another shape, or others than the run had.
    """
    if reference is None:
        data = _training_data(subjects, give)
    else:
        _, height, width = subjects[0].image_shape
        channels: Channels = 3 if subjects[0].image_shape[0] == 3 else 1
        data = ImageDataModule(
            reference,
            (height, width),
            channels,
            val_fraction=0,  # all of the training split
        )
    images = _images(data, reference, option, give)
    check_shape(subjects[0].path, subjects[0].image_shape, data.source, images.image_shape)
    if reference is None:
        _check_unchanged(subjects, images, give)
    return data


def _statistics(
    path: Path, subject: Subject, extractor: Extractor, metrics: list[Metric]
) -> ReferenceChoice:
    if not path.is_file():
        raise InputError(f"--reference {path}: no such file")
    reference = load_reference(path, extractor, metrics)
    contents = reference.protocol.get("reference", {})
    try:
        shape = list(contents["image_shape"])
        _ = contents["images_sha256"], contents["num_images"], contents["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not say which images it is of ({error})") from error
    check_shape(subject.path, subject.image_shape, str(path), shape)
    file = {"path": str(path), "sha256": file_sha256(path)}
    return ReferenceChoice(reference.protocol, lambda: reference, file)


def _training_data(subjects: Sequence[Subject], give: str) -> ImageDataModule:
    """Open the images that the subjects' runs, or the run, train on."""
    runs = {}
    for subject in subjects:
        if not isinstance(subject, Checkpoint) or subject.run is None:
            raise InputError(f"{subject.path}: lies in no run's folder; {give}")
        runs[subject.run.root.resolve()] = subject.run
    first, *others = runs.values()
    try:
        data = RunConfig.of(first).training_data()
        for other in others:
            images = RunConfig.of(other).training_data().train_images
            if images.sha256 != data.train_images.sha256:
                raise InputError(f"{first.root} and {other.root} trained on different images")
    except InputError as error:
        raise InputError(f"{without_remedy(error)}; {give}") from error
    return data


def _images(data: ImageDataModule, reference: str | None, option: str, give: str) -> Images:
    try:
        return data.train_images
    except InputError as error:
        if reference is None:
            raise InputError(
                f"the run's training images: {without_remedy(error)} (a path is taken from the "
                f"folder where one is); {give}"
            ) from error
        raise InputError(f"{option} {reference}: {without_remedy(error)}") from error


def _check_unchanged(subjects: Sequence[Subject], images: Images, give: str) -> None:
    """Refuse a source that gives other images than it did in training."""
    for subject in subjects:
        assert isinstance(subject, Checkpoint)
        if subject.data.get("images_sha256", images.sha256) != images.sha256:
            raise InputError(
                f"{subject.path}: the source of its training images gives others by now; {give}"
            )
