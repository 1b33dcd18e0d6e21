"""Which rows there are. Not in `__main__`, which spawned processes do not import."""

from importlib import import_module

from benchmarks.harness import Row

# row -> where it is measured, and the minutes after which it begins no further round
QUICK = {
    "data-map": ("data:data_map", 1.0),
    "data-stream-png": ("data:data_stream_png", 1.0),
    "data-stream-png-within": ("data:data_stream_png_within", 1.0),
    "data-stream-png-own": ("data:data_stream_png_own", 1.0),
    "data-stream-raw": ("data:data_stream_raw", 1.0),
    "start": ("command:start", 1.5),
    "trainer-cost": ("command:trainer_cost", 3.0),
    "sampler-cost": ("command:sampler_cost", 1.5),
    "memory": ("memory:memory", 4.0),
    "memory-time": ("memory:memory_time", 3.0),
    "train-small": ("training:train_small", 2.0),
    "train-large": ("training:train_large", 4.0),
}
FULL = {
    "few-step-10": ("quality:few_step_10", 60.0),
    "few-step-20": ("quality:few_step_20", 60.0),
    "time-to-quality": ("time_to_quality:time_to_quality", 90.0),
    "time-to-quality-harder": ("time_to_quality:time_to_quality_harder", 90.0),
}
"""What does not fit into the half hour of QUICK."""
ROWS = {**QUICK, **FULL}


def measure(name: str, runs: int) -> Row:
    """Measure one row, in this process."""
    place, minutes = ROWS[name]
    module, function = place.split(":")
    row: Row = getattr(import_module(f"benchmarks.{module}"), function)(runs, 60 * minutes)
    return row
