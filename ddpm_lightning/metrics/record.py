"""What a number stands on: its record, and when two numbers may be compared.

A record has `protocol` (all that must be equal for two numbers to be comparable), `subject` (what
was judged) and `environment` (on what, by which versions, in how many seconds).
"""

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ddpm_lightning.checkpoints import flatten
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically
from ddpm_lightning.metrics.judge import METHODS
from ddpm_lightning.samplers import SAMPLERS, Guidance, Sampler

RECORD_VERSION = 1

Record = dict[str, Any]

_PACKAGES = ("ddpm-lightning", "torch", "lightning", "torch-fidelity", "numpy")


def make_record(
    metrics: dict[str, float],
    num_images: int,
    protocol: dict[str, Any],
    subject: dict[str, Any],
    seconds: float,
    device: torch.device,
    warnings: list[str],
) -> Record:
    """Put together a record.

    Args:
        metrics: Values by name.
        num_images: Images judged.
        protocol: All else that must be equal for two numbers to be comparable.
        subject: Checkpoint, weights, sampler, seeds; or the folder of images.
        seconds: How long it took.
        device: What it was computed on.
        warnings: What a reader of the numbers should know.
    """
    return {
        "record_version": RECORD_VERSION,
        "metrics": metrics,
        "num_images": num_images,
        "protocol": {"num_images": num_images, **protocol},
        "subject": subject,
        "environment": {**_environment(device), "seconds": round(seconds, 3)},
        "warnings": warnings,
    }


def make_protocol(num_images: int, protocol: dict[str, Any]) -> dict[str, Any]:
    """Put together the protocol of samples that are compared with images by their features.

    Args:
        num_images: Samples judged.
        protocol: Reference and extractor.
    """
    return {
        "num_images": num_images,
        "quantisation": "clamped to [-1, 1], rounded to uint8",
        "methods": dict(METHODS),
        **protocol,
    }


def describe_sampler(sampler: Sampler, num_steps: int) -> dict[str, Any]:
    """Describe a sampler by its name and fields, its number of steps spelled out."""
    return {"name": sampler.name, **asdict(sampler), "num_steps": num_steps}


def describe_guidance(
    guidance: Guidance | None, num_classes: int, guide: dict[str, Any] | None = None
) -> dict[str, Any] | str:
    """Describe what samples were told, seed i's class being i modulo `num_classes`.

    Args:
        guidance: How strongly they were guided.
        num_classes: How many classes there are, if any.
        guide: By which checkpoint, if by one.
    """
    if not num_classes and guide is None:
        return "none"
    labels = {"labels": f"seed modulo {num_classes}"} if num_classes else {}
    return labels | asdict(guidance or Guidance()) | ({} if guide is None else {"guide": guide})


def unusual_options(sampler: dict[str, Any]) -> list[str]:
    """Say what of a described sampler is not its default, such as `eta 0.5`, `even`, `clip none`.

    The oldest descriptions have no spacing, and say `clip` true for what is `static` now.
    """
    defaults = {field.name: field.default for field in fields(SAMPLERS[sampler["name"]])}
    if sampler.get("clip") is True:
        sampler = {**sampler, "clip": "static"}
    forms = {"eta": "eta {:g}", "spacing": "{}", "clip": "clip {}"}
    return [
        form.format(sampler[option])
        for option, form in forms.items()
        if option in sampler and sampler[option] != defaults[option]
    ]


def sampler_slug(sampler: dict[str, Any]) -> str:
    """Name a described sampler in file names, such as ddim-50-eta0.5."""
    words = [sampler["name"], str(sampler["num_steps"]), *unusual_options(sampler)]
    return "-".join(words).replace(" ", "")


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_record(path: str | Path) -> Record:
    """Read a record.

    Raises:
        InputError: There is none at the path.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no record of a metric ({error})") from error
    needed = {"metrics", "protocol", "subject", "environment"}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), dict) for k in needed):
        raise InputError(f"{path}: not a record of a metric; fid writes them as record.json")
    return record


def protocol_differences(a: Record, b: Record) -> list[str]:
    """List the fields of the protocols that differ, as `key: a's value, b's value`.

    Numbers whose list is empty may be compared. What the reference is called does not matter: its
    images' hash says what it is.
    """
    ours, theirs = flatten(a["protocol"]), flatten(b["protocol"])
    keys = sorted((ours.keys() | theirs.keys()) - {"reference.name"})
    return [
        f"{key}: {ours.get(key)}, {theirs.get(key)}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _environment(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    on_gpu = device.type == "cuda"
    return {
        "versions": versions,
        "git_commit": _git_commit(),
        "command": shlex.join(sys.argv),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cudnn.allow_tf32 if on_gpu else False,
        "cudnn_benchmark": torch.backends.cudnn.benchmark if on_gpu else False,
    }


def _git_commit() -> str | None:
    """Name the commit of a checkout; an installed package has none."""
    package = Path(__file__).parents[1]
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    root, commit = answer.stdout.splitlines()
    # an environment may lie in the folder of a project of the user's
    return commit if Path(root) == package.parent else None
