"""From what a user calls a stream to the files of its splits."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from ddpm_lightning.data import hugging_face, image_folder
from ddpm_lightning.data.items import SplitName, find_splits
from ddpm_lightning.data.sources import HUB_NAME, suggest
from ddpm_lightning.data.stream_blocks import STREAMED
from ddpm_lightning.data.stream_files import (
    START_DELAYS,
    File,
    HttpFile,
    LocalFile,
    LocalFiles,
    patiently,
)
from ddpm_lightning.errors import InputError

_INDEX_SUFFIXES = (".txt", ".json")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 10_000_000  # what braces expand to at most: a slip must not fill the memory

TAKES = (
    "streaming takes a folder, a file or a URL of Parquet files, tars or images, a pattern such as "
    "https://host/train-{000..099}.tar, an index that lists them (.txt or .json), or a data set on "
    "the Hugging Face hub"
)


def list_files(source: str) -> Mapping[SplitName, Sequence[File]]:
    """List the files of each split.

    A folder's splits are its subfolders train, val and test, or told by the names of its files.
    A JSON index has a list per split; any other list of files is the training split.

    Raises:
        InputError: There is nothing, or nothing that can be streamed.
    """
    if "://" not in source:
        path = Path(source).expanduser()
        if source and path.is_dir():
            return _folder(source, path)
        if not path.exists() and HUB_NAME.fullmatch(source):
            return _hub(source)
    named = expand_braces(source)
    if len(named) == 1 and _path_of(named[0]).endswith(_INDEX_SUFFIXES):
        return _index(source, named[0])
    return {"train": [_file(source, name) for name in named]}


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..099} and {a,b} as a shell does, in order; at any number of places.

    Raises:
        InputError: A range is upside down, or there would be too many.
    """
    pieces = _BRACES.split(pattern)  # every second one stood in braces
    choices = [[piece] for piece in pieces]
    for index in range(1, len(pieces), 2):
        if match := _RANGE.fullmatch(pieces[index]):
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < _MAX_FILES:
                raise InputError(
                    f"--data.source {pattern}: {{{pieces[index]}}} must go from the lower number "
                    f"to the higher, by fewer than {_MAX_FILES:,}"
                )
            choices[index] = [f"{n:0{len(match[1])}}" for n in range(first, last + 1)]
        else:
            choices[index] = pieces[index].split(",")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _file(source: str, name: str) -> File:
    is_remote = "://" in name
    path = Path(name).expanduser()
    if not is_remote and not path.is_file():
        missing = f"--data.source {source}" if source == name else f"--data.source {source}: {name}"
        raise InputError(f"{missing} does not exist{suggest(source, path)}; {TAKES}")
    if not _path_of(name).endswith(STREAMED):
        raise InputError(f"--data.source {source}: {name} cannot be streamed: {TAKES}")
    if not is_remote:
        return LocalFile(str(path))
    if not name.startswith(("http://", "https://")):
        raise InputError(
            f"--data.source {source}: {name} is no http:// or https:// address; {TAKES}"
        )
    return HttpFile(name)


def _index(source: str, name: str) -> Mapping[SplitName, Sequence[File]]:
    """Read an index: lines, a JSON list, or a JSON object of lists; entries lie beside it."""
    is_remote = "://" in name
    file: File = HttpFile(name) if is_remote else LocalFile(str(Path(name).expanduser()))
    try:
        text = patiently(file.read_all, START_DELAYS).decode()
        if _path_of(name).endswith(".json"):
            content = json.loads(text)
            listed = content if isinstance(content, dict) else {"train": content}
        else:
            lines = (line.strip() for line in text.splitlines())
            listed = {"train": [line for line in lines if line and not line.startswith("#")]}
        splits = find_splits(source, listed)
        entries = {split: list(map(str, listed[key])) for split, key in splits.items()}
        if not entries["train"]:
            raise ValueError("it lists no files to train on")
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--data.source {source}: not an index of files ({error}); it is a line for each, or "
            'JSON such as {"train": ["0.tar"], "val": ["1.tar"]}'
        ) from error
    return {
        split: [
            _file(source, _beside(name, entry))
            for pattern in patterns
            for entry in expand_braces(pattern)
        ]
        for split, patterns in entries.items()
    }


def _beside(index: str, entry: str) -> str:
    """Give the path or URL of an index's entry."""
    if "://" in entry:
        return entry
    return urljoin(index, entry) if "://" in index else str(Path(index).parent / entry)


def _folder(source: str, folder: Path) -> Mapping[SplitName, Sequence[File]]:
    listed = image_folder.list_files(folder)
    paths = [file.path.lower() for file in listed]
    if any(path.endswith((".parquet", ".tar")) for path in paths):
        return {
            split: [LocalFile(path) for path in names]
            for split, names in hugging_face.list_folder(source, folder).items()
        }
    if any(path.endswith(image_folder.SUFFIXES) for path in paths):
        splits = image_folder.sort_into_splits(source, folder, listed)
        return {
            split: LocalFiles(folder, [file.path for file in files])
            for split, files in splits.items()
        }
    raise InputError(f"--data.source {source} has nothing in it that can be streamed: {TAKES}")


def _hub(source: str) -> Mapping[SplitName, Sequence[File]]:
    found = hugging_face.list_hub(source, suggest(source, Path(source)))
    return {
        split: [HttpFile(url, headers) for url, headers in files] for split, files in found.items()
    }


def _path_of(name: str) -> str:
    """What a name ends in, in lower case, without a URL's query."""
    try:
        return (urlsplit(name).path if "://" in name else name).lower()
    except ValueError as error:
        raise InputError(f"--data.source: {name} is no address ({error}); {TAKES}") from error
