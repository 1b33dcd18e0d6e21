"""Measure rows: `python -m benchmarks [ROW ...]`; results.json and docs/benchmarks.md take them."""

import argparse
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.harness import keep, text_of
from benchmarks.rows import FULL, QUICK, ROWS, measure


def main() -> None:
    """Measure each row in a process of its own, and keep it as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--runs", type=int, default=11, help="rounds, where the row's time allows")
    parser.add_argument("--full", action="store_true", help="the rows that take long, instead")
    options = parser.parse_args()
    names = options.rows or (FULL if options.full else QUICK)
    if unknown := set(names) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))} (rows: {', '.join(ROWS)})")
    failed = []
    for name in names:
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(measure, name, options.runs).result()
        except Exception:  # whatever a peer does: the other rows are worth having
            traceback.print_exc()
            failed.append(name)
            continue
        print(text_of(row), flush=True)
        keep([row])
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
