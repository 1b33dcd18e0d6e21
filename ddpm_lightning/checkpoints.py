"""What a checkpoint file holds, how it is checked, and how a network is rebuilt from it.

A checkpoint is Lightning's dictionary with four keys of ours: `hyper_parameters` (plain values
that rebuild the module), `ema_state_dict` (`state_dict` holds the raw weights), `format_version`,
and, from version 2 on, `content_sha256`, which is checked whenever a file is read.
It loads with `weights_only=True`: nothing in the file is executed.
"""

import hashlib
import importlib
import inspect
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError

FORMAT_VERSION = 3

# What models were before hyper_parameters said so: in version 1, and up to version 2.
_VERSION_1: dict[str, Any] = {
    "zero_terminal_snr": False,
    "prediction": "noise",
    "loss": "simple",
    "weighting": "none",
    "timestep_sampling": "uniform",
}
_VERSION_2: dict[str, Any] = {"label_dropout": 0.1}  # no network was told classes
# A network's newer arguments have no effect by default, but for this one.
_VERSION_2_UNET: dict[str, Any] = {"group_channels": 1}
_UNET = "ddpm_lightning.networks.unet.UNet"

# Without these there is no model; only a run that kept an average has the last.
_NEEDED = {"state_dict": dict, "hyper_parameters": dict, "global_step": int}
_HELD = {**_NEEDED, "ema_state_dict": dict}

Weights = Literal["ema", "raw"]


def describe(net: nn.Module) -> dict[str, Any]:
    """Describe a network by its class and constructor arguments, as plain values.

    Args:
        net: Keeps each constructor argument as an attribute of the same name.

    Raises:
        InputError: An argument is not kept, or is more than a plain value.
    """
    cls = type(net)
    arguments = {}
    for name in inspect.signature(cls).parameters:
        if not hasattr(net, name):
            raise InputError(
                f"{cls.__name__} must keep its constructor argument as self.{name}, so that a "
                "checkpoint can rebuild it"
            )
        arguments[name] = getattr(net, name)
        if not _is_plain(arguments[name]):
            raise InputError(
                f"{cls.__name__} keeps a {type(arguments[name]).__name__} as self.{name}; keep the "
                "constructor argument there, a number, text, list or dict, so that a checkpoint "
                "can rebuild it"
            )
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def build(description: dict[str, Any]) -> nn.Module:
    """Build the network that `describe` described, with fresh weights.

    Raises:
        InputError: The class cannot be imported, or is not a network.
    """
    cls = import_network(str(description["class_path"]))
    net: nn.Module = cls(**description["init_args"])
    return net


def import_network(class_path: str) -> type[nn.Module]:
    """Import a network's class by its path.

    Raises:
        InputError: It cannot be imported, or is not a network.
    """
    module_name, _, class_name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"the network {class_path} cannot be imported: {error}") from error
    # Anything may be named in a file; only networks are called.
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(f"{class_path} is not a torch.nn.Module")
    return cls


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint of this project.

    Args:
        path: The file.
        mmap: Map the tensors from the file, so that only those that are used are read.

    Raises:
        InputError: There is no such file, or it is damaged, foreign or newer than this code. Any
            byte that changes what is read is found, by `content_sha256`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layouts that no checkpoint of ours has
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler stumbles over a foreign file in any way it likes
        raise InputError(
            f"{path}: not a whole checkpoint file; use another one, such as the newest step=N.ckpt "
            "beside it"
        ) from error
    if not isinstance(checkpoint, dict) or "format_version" not in checkpoint:
        raise InputError(f"{path}: not a ddpm_lightning checkpoint (it has no format_version)")
    version = checkpoint["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {version} is newer than this ddpm_lightning reads "
            f"({FORMAT_VERSION}); upgrade it"
        )
    missing = _NEEDED.keys() - checkpoint.keys()
    if missing:
        raise InputError(f"{path}: the checkpoint lacks {', '.join(sorted(missing))}")
    for key, kind in _HELD.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise InputError(f"{path}: the checkpoint's {key} is no {kind.__name__}")
    if not _is_plain(checkpoint["hyper_parameters"]):
        raise InputError(f"{path}: the checkpoint's hyper_parameters are more than plain values")
    # version 1 has no digest
    is_sealed = version > 1 or "content_sha256" in checkpoint
    if is_sealed and not _is_as_sealed(checkpoint):
        raise InputError(
            f"{path}: damaged, its content is not what was written; use another one, such as the "
            "newest step=N.ckpt beside it"
        )
    if version <= 2:
        since = _VERSION_2 if version == 2 else _VERSION_1 | _VERSION_2
        checkpoint["hyper_parameters"] = {**since, **checkpoint["hyper_parameters"]}
        _complete_unet(checkpoint["hyper_parameters"].get("net"))
    return checkpoint


def _complete_unet(description: Any) -> None:
    """Say in its description what a U-Net of version 2 was."""
    if isinstance(description, dict) and description.get("class_path") == _UNET:
        arguments = description.get("init_args")
        if isinstance(arguments, dict):
            description["init_args"] = {**_VERSION_2_UNET, **arguments}


def seal(checkpoint: dict[str, Any]) -> None:
    """Note the version and the digest of a checkpoint that is whole."""
    checkpoint["format_version"] = FORMAT_VERSION
    checkpoint["content_sha256"] = content_sha256(checkpoint)


def _is_as_sealed(checkpoint: dict[str, Any]) -> bool:
    try:
        return bool(checkpoint.get("content_sha256") == content_sha256(checkpoint))
    except (RuntimeError, RecursionError):  # sparse or endless, as nothing is that was sealed
        return False


def content_sha256(checkpoint: dict[str, Any]) -> str:
    """Hash all that a checkpoint holds but this digest: keys, tensors and plain values.

    The file's own check sums would not do: torch does not look at them.
    """
    content = {key: value for key, value in checkpoint.items() if key != "content_sha256"}
    leaves = list(_leaves(content, ""))
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter
        texts = pool.map(lambda leaf: f"{leaf[0]}: {_text_of(leaf[1])}\n", leaves)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what is in a nest of dicts and lists, each under the keys that lead to it."""
    if isinstance(value, dict | list | tuple):
        yield name, f"{type(value).__name__} of {len(value)}"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from _leaves(part, f"{name}/{key!r}")
    else:
        yield name, value


def _text_of(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    values = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    sha256 = hashlib.sha256(values.numpy().data).hexdigest()
    return f"{value.dtype} {list(value.shape)} {sha256}"


def file_sha256(path: str | Path) -> str:
    """Hash a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def select_weights(
    checkpoint: dict[str, Any], weights: Weights, path: str | Path
) -> dict[str, Tensor]:
    """Take the EMA or the raw weights of a checkpoint.

    Raises:
        InputError: It holds no EMA weights.
    """
    if weights == "raw":
        state: dict[str, Tensor] = checkpoint["state_dict"]
    elif "ema_state_dict" in checkpoint:
        state = checkpoint["ema_state_dict"]
    else:
        raise InputError(
            f"{path}: the run kept no EMA weights; ask for the raw ones (--weights raw)"
        )
    return state


MEMORY_ONLY = "net.init_args.checkpointing"
"""Changes numbers by rounding alone: a run that ran out of memory may go on with it."""


def check_same_model(checkpoint: dict[str, Any], ours: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint whose hyper-parameters are not ours, naming the first that differs.

    Raises:
        InputError: They differ.
    """
    theirs, mine = flatten(checkpoint["hyper_parameters"]), flatten(ours)
    if theirs.get("net.class_path") == mine["net.class_path"]:
        # arguments that the network has got since then have no effect by default
        defaults = inspect.signature(import_network(mine["net.class_path"])).parameters.values()
        arguments = {p.name: p.default for p in defaults if p.default is not p.empty}
        theirs = flatten(arguments, "net.init_args.") | theirs
    keys = (theirs.keys() | mine.keys()) - {MEMORY_ONLY}
    # the variance before the network, whose channels follow from it
    for key in sorted(keys, key=lambda key: (key != "variance", key)):
        if theirs.get(key) != mine.get(key):
            raise InputError(
                f"{path}: written with model.{key} = {theirs.get(key)}, but this command has "
                f"{mine.get(key)}; give --model.{key} {theirs.get(key)}, or the run's own "
                "config.yaml with --config"
            )


def check_same_optimizer(
    checkpoint: dict[str, Any], ours: torch.optim.Optimizer, path: str | Path
) -> None:
    """Refuse a checkpoint whose optimizer is of another kind: what it keeps would mean nothing.

    A checkpoint does not say which it was. Options tell most kinds apart; a later version of the
    same one may have more of them.

    Raises:
        InputError: Each of the two has options that the other has not.
    """
    try:
        groups = [
            group for state in checkpoint["optimizer_states"] for group in state["param_groups"]
        ]
        theirs = set().union(*groups) - {"params", "initial_lr"}
    except (KeyError, TypeError):
        return  # it cannot be restored at all, which is told then
    mine = set().union(*ours.param_groups) - {"params", "initial_lr"}
    if theirs - mine and mine - theirs:
        raise InputError(
            f"{path}: written by another optimizer than {type(ours).__name__}, one that has "
            f"{', '.join(sorted(theirs - mine))}; give its --model.optimizer, or the run's own "
            "config.yaml with --config"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested dictionaries by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
