"""What the package asks for, and what the container installs."""

from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


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
