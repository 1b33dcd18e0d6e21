"""What the package asks for, and what the container installs."""

import re
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_container_runs_as_a_plain_user_and_is_not_open_to_others() -> None:
    user = re.findall(r"^USER (\w+)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert user
    assert "root" not in user
    ports = re.findall(
        r'^ +- "([\d.:]+)"', (ROOT / "docker/compose.yaml").read_text(), re.MULTILINE
    )
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {item.name.lower().replace("_", "-"): item for item in map(Requirement, lines)}


def test_the_container_has_every_dependency_at_a_version_that_will_do() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    asked = requirements(config["options"]["install_requires"])
    pinned = requirements((ROOT / "docker" / "requirements.txt").read_text())
    assert len(asked) > 5
    for name, requirement in asked.items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier, name
