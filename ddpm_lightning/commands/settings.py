"""What a command notes about its settings beside what it writes."""

import json
from pathlib import Path
from typing import Any

from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically


def check_settings(
    record: Path, settings: dict[str, Any], out: str, holds: str, is_whole: bool = False
) -> None:
    """Refuse to go on with, or to write over, what was written with other settings.

    Args:
        record: The file that notes them; it exists.
        settings: Those of now, as JSON gives them back.
        out: The output, as the user named it.
        holds: What it would hold, such as "holds samples".
        is_whole: Whether the file notes settings alone, so that one which is left out now differs.

    Raises:
        InputError: It cannot be read, or a setting differs.
    """
    try:
        there = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{record}: cannot be read ({error}); choose another --out") from error
    # the same file may be named in several ways
    for key in [*settings, *(there if is_whole else [])]:
        if key != "checkpoint" and there.get(key) != settings.get(key):
            raise InputError(
                f"--out {out}: {holds} with {key} {there.get(key)}, not {settings.get(key)}; "
                "choose another"
            )


def claim_folder(folder: Path, settings: dict[str, Any], holds: str) -> None:
    """Note what a folder is to hold in its settings.json; refuse one that holds something else.

    Args:
        folder: The output; an empty one, one of the same settings, or none yet.
        settings: What its contents depend on, as JSON gives them back.
        holds: What it would hold, such as "holds samples".

    Raises:
        InputError: It holds what other settings gave, or other files.
    """
    record = folder / "settings.json"
    if record.exists():
        check_settings(record, settings, str(folder), holds, is_whole=True)
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: a file; choose a folder")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: not empty, and nothing is overwritten; choose another")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2)
        write_atomically(record, lambda file: file.write(text.encode()))
