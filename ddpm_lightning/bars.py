"""How all progress bars behave."""

import sys
from typing import Any


def bar_options(**options: Any) -> dict[str, Any]:
    """Give the options that all of the project's bars share; a log file gets a line a minute."""
    seconds = 0.2 if sys.stderr.isatty() else 60.0
    return {"mininterval": seconds, "maxinterval": seconds, "dynamic_ncols": True, **options}
