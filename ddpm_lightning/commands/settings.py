"""What a command notes about its settings beside what it writes."""

import json
from pathlib import Path
from typing import Any

from ddpm_lightning.errors import InputError


def check_settings(record: Path, settings: dict[str, Any], out: str, holds: str) -> None:
    """Refuse to go on with, or to write over, what was written with other settings.

    Args:
        record: The file that notes them; it exists.
        settings: Those of now, as JSON gives them back.
        out: The output, as the user named it.
        holds: What it would hold, such as "holds samples".

    Raises:
        InputError: It cannot be read, or a setting differs.
    """
    try:
        there = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{record}: cannot be read ({error}); choose another --out") from error
    # the same file may be named in several ways
    for key in settings:
        if key != "checkpoint" and there.get(key) != settings[key]:
            raise InputError(
                f"--out {out}: {holds} with {key} {there.get(key)}, not {settings[key]}; "
                "choose another"
            )
