"""Runs generated cases: each ends well or in one clear line, without a hang, in bounded memory."""

import faulthandler
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis.strategies import SearchStrategy

Case = TypeVar("Case")

QUICK, SLOW = 20, 200

# Far more than the slowest case takes on the slowest machine: nothing is timed by this.
HANG_SECONDS = 300
# What a case may take beyond what the process has: sizes without sense must not fill the machine.
MEMORY = 4 * 2**30


class Cases:
    """How many cases a family runs, and how many of them were refused.

    Args:
        num_wanted: Cases to generate.
        same_each_time: Whether to generate the same ones in each run.
        record: Tells the report of the test how many ran.
    """

    def __init__(
        self, num_wanted: int, same_each_time: bool, record: Callable[[str, object], None]
    ) -> None:
        self.num_wanted = num_wanted
        self._same_each_time = same_each_time
        self._record = record
        self._num_run = 0
        self._num_refused = 0

    @property
    def are_many(self) -> bool:
        """Whether this is the long run."""
        return self.num_wanted > QUICK

    def run(
        self,
        strategy: SearchStrategy[Case],
        check: Callable[[Case], bool],
        always: Iterable[Case] = (),
    ) -> None:
        """Check generated cases.

        Args:
            strategy: Generates them.
            check: Fails where a case ends badly; tells whether it was refused.
            always: Cases that are checked too.
        """

        @settings(
            max_examples=self.num_wanted,
            derandomize=self._same_each_time,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],  # shrinking commands takes many minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run_one(case: Case) -> None:
            self._num_run += 1
            with bounds():
                self._num_refused += check(case)

        for case in always:
            run_one = example(case)(run_one)
        try:
            run_one()
        finally:
            self._record("cases", [self._num_run, self._num_refused])


@contextmanager
def bounds() -> Iterator[None]:
    """Fail where a case hangs or takes all memory."""

    def stop(*_: object) -> None:
        pytest.fail(f"hangs: not done after {HANG_SECONDS} s")

    # Where the hang is not in Python, or in a thread, the signal is not served: end the process.
    faulthandler.dump_traceback_later(2 * HANG_SECONDS, exit=True, file=2)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()
