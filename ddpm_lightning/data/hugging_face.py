"""Data sets that the `datasets` library reads: Parquet and Arrow files, saved ones, the hub.

Its images are taken undecoded, so that the one rule in `images.convert` holds for every source.
The library is imported where it is used: it takes a second that other sources need not wait.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ddpm_lightning.data.items import (
    Labels,
    Source,
    SplitName,
    file_stamp,
    find_splits,
    fingerprint,
    numbered,
)
from ddpm_lightning.errors import InputError

SUFFIXES = (".parquet", ".arrow")
"""What files of rows end in, in lower or upper case."""

_PREFERRED_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_HUB_TIMEOUT = 10.0  # seconds until the hub counts as out of reach

_HUB_PATH = re.compile(r"hf://datasets/(.+?)@([^/]+)/(.+)")

Answer = TypeVar("Answer")


class Rows:
    """A split made of the rows of a table.

    Args:
        table: A `datasets.Dataset` with one column of undecoded images.
        column: Its name.
        split: What the data set calls the split.
    """

    def __init__(self, table: Any, column: str, split: str) -> None:
        self._table = table
        self._column = column
        self._split = split

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> bytes:
        image = self._table[index][self._column]
        if image is None:
            raise ValueError("the row has no image")
        data: bytes | None = image["bytes"]
        return Path(image["path"]).read_bytes() if data is None else data

    def name(self, index: int) -> str:
        """The row and the split it is in."""
        return f"row {index} of split {self._split}"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a `Dataset` or a `DatasetDict` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def open_saved(source: str, folder: Path) -> Source:
    """Open a folder that `save_to_disk` wrote; a `Dataset` without splits is the training split."""
    import datasets

    load = partial(datasets.load_from_disk, str(folder), keep_in_memory=False)  # see _read
    return _to_source(source, _load(source, load))


def open_folder(source: str, folder: Path) -> Source:
    """Open a folder of Parquet or Arrow files, whose names tell the splits (`test-0.parquet`)."""
    return _to_source(source, _load(source, lambda: _read(str(folder))))


def open_file(source: str, file: Path) -> Source:
    """Open one Parquet or Arrow file as the training split."""
    builder = file.suffix.lower()[1:]
    loaded = _load(source, lambda: _read(builder, data_files=str(file)))
    return _to_source(source, loaded)


def open_hub(source: str, hint: str) -> Source:
    """Open a data set of the Hugging Face hub, or its copy in the hub's cache on this machine.

    Args:
        source: Its name there, such as "cifar10", "owner/name" or "owner/name:configuration".
        hint: A clause to put into the message where there is none.

    Raises:
        InputError: The hub does not have it; or the hub is out of reach, and there is no copy.
    """
    return _ask_hub(
        source,
        hint,
        lambda name, configuration: _to_source(
            source, _load(source, lambda: _read(name, configuration), hint)
        ),
    )


def list_folder(source: str, folder: Path) -> dict[SplitName, list[str]]:
    """List the files of a folder's splits, as their names tell them; nothing is read."""
    import datasets

    return _files_of(source, _load(source, lambda: datasets.load_dataset_builder(str(folder))))


def list_hub(source: str, hint: str) -> dict[SplitName, list[tuple[str, Mapping[str, str]]]]:
    """List the files of a data set of the hub: URLs, and the headers to ask for them with.

    Args:
        source: See `open_hub`.
        hint: See `open_hub`.

    Raises:
        InputError: The hub does not have it, or is out of reach.
    """
    import datasets
    from huggingface_hub import get_token, hf_hub_url

    def ask(name: str, configuration: str | None) -> dict[SplitName, list[str]]:
        builder = _load(source, lambda: datasets.load_dataset_builder(name, configuration), hint)
        return _files_of(source, builder)

    def to_url(path: str) -> str:
        found = _HUB_PATH.fullmatch(path)
        assert found is not None, path
        name, revision, file = found.groups()
        endpoint = datasets.config.HF_ENDPOINT
        return hf_hub_url(name, file, repo_type="dataset", revision=revision, endpoint=endpoint)

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return {
        split: [(to_url(path), headers) for path in paths]
        for split, paths in _ask_hub(source, hint, ask).items()
    }


def _ask_hub(source: str, hint: str, ask: Callable[[str, str | None], Answer]) -> Answer:
    """Call `ask` with a data set's name and configuration.

    Raises:
        InputError: The hub is out of reach.
    """
    import datasets

    # load_dataset tries for 24 seconds to reach a hub that is not there. Told that it is offline,
    # it looks for what it has downloaded before, at once.
    name, _, configuration = source.partition(":")
    reason = _why_out_of_reach(name)
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or bool(reason)
    try:
        return ask(name, configuration or None)
    except ConnectionError as error:
        raise InputError(
            f"--data.source {source} is no folder here{hint}, and the Hugging Face hub is out of "
            f"reach ({reason or _one_line(error)}); give a folder, or connect to the network"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _why_out_of_reach(source: str) -> str:
    """Ask the hub once; "" if it answers, whatever the answer."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(source, timeout=_HUB_TIMEOUT)
    except HfHubHTTPError:
        return ""
    except Exception as error:  # whatever the hub's HTTP library of the day raises
        return _one_line(error)
    return ""


def _files_of(source: str, builder: Any) -> dict[SplitName, list[str]]:
    """List the files of a builder's splits."""
    listed: dict[Any, list[str]] = builder.config.data_files or {}
    named = {str(split): list(map(str, files)) for split, files in listed.items()}
    found = {split: named[name] for split, name in find_splits(source, named).items()}
    if not found.get("train"):
        raise InputError(
            f"--data.source {source} has no files of a split train, but {', '.join(named) or 0}"
        )
    return found


def _load(source: str, load: Callable[[], Any], hint: str = "") -> Any:
    try:
        return load()
    except ConnectionError:
        raise
    except Exception as error:  # builders raise whatever a malformed file leads to
        raise InputError(
            f"--data.source {source} cannot be loaded{hint}: {_one_line(error)}"
        ) from error


def _read(*arguments: Any, **options: Any) -> Any:
    """Have `datasets` map a set's files, whatever a variable of the environment says.

    They tell a set from others; held in memory, it has none.
    """
    import datasets

    return datasets.load_dataset(*arguments, **options, keep_in_memory=False)


def _to_source(source: str, loaded: Any) -> Source:
    """Take the images of a `datasets.Dataset` or `datasets.DatasetDict`."""
    import datasets

    tables = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    splits: dict[SplitName, Rows] = {}
    labels: dict[SplitName, Callable[[], Labels]] = {}
    stamps = []
    for split, name in find_splits(source, tables).items():
        if not len(table := tables[name]):
            continue
        column = _image_column(source, table.features)
        undecoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        splits[split] = Rows(undecoded, column, name)
        if columns := _label_columns(table.features):
            labels[split] = partial(_read_labels, source, table, columns)
        # The path of a downloaded or converted file holds a hash of where it came from.
        files = [Path(file["filename"]).resolve() for file in table.cache_files]
        stamps.append([split, column, [file_stamp(file) for file in files]])
    if "train" not in splits:
        raise InputError(
            f"--data.source {source} has no rows in a split train, but {', '.join(tables)}"
        )
    return Source(source, fingerprint(["table", stamps]), splits, labels)


def _image_column(source: str, features: Any) -> str:
    import datasets

    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise InputError(
            f"--data.source {source} has no column of type Image, but {', '.join(features)}"
        )
    preferred = [name for name in _PREFERRED_COLUMNS if name in columns]
    if len(columns) > 1 and len(preferred) != 1:
        raise InputError(
            f"--data.source {source} has several columns of images ({', '.join(columns)}); "
            f"keep one, or name it image"
        )
    return (columns if len(columns) == 1 else preferred)[0]


def _label_columns(features: Any) -> list[str]:
    """Name the columns of type ClassLabel, else those of whole numbers that are called labels."""
    import datasets

    columns = [
        name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    if columns:
        return columns
    return [
        name
        for name in _LABEL_COLUMNS
        if isinstance(features.get(name), datasets.Value) and "int" in features[name].dtype
    ]


def _read_labels(source: str, table: Any, columns: list[str]) -> Labels:
    preferred = [name for name in _LABEL_COLUMNS if name in columns]
    if len(columns) > 1 and not preferred:
        raise InputError(
            f"--data.source {source} has several columns of labels ({', '.join(columns)}); name "
            "one of them label"
        )
    column = (preferred or columns)[0]
    cells = table.select_columns([column])[:][column]
    values = np.array([-1 if cell is None else cell for cell in cells], dtype=np.int64)
    names = getattr(table.features[column], "names", None)  # ClassLabel's alone
    return numbered(values) if names is None else Labels(values, len(names), tuple(names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
