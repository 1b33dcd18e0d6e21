"""Each family of generated cases runs with few and with many; how many is told at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import train
from tests.properties.cases import QUICK, SLOW, Cases


@pytest.fixture(
    params=[
        pytest.param(QUICK, id="quick"),
        pytest.param(SLOW, id="slow", marks=pytest.mark.slow),
    ]
)
def cases(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Cases:
    """The same cases in each run, unless --hypothesis-seed asks for others."""
    same = request.config.getoption("--hypothesis-seed") is None
    return Cases(request.param, same, record_property)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The folder of a run of ten steps; do not write to it."""
    return train(tmp_path_factory.mktemp("trained"), pictures)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        f"{report.nodeid}: {counts[0]} cases, {counts[1]} refused"
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for key, counts in report.user_properties
        if key == "cases"
    ]
    if lines:
        terminalreporter.section("generated cases")
        for line in lines:
            terminalreporter.line(line)
