"""The rules on imports in CONTRIBUTING.md, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpm_lightning

PACKAGE = Path(ddpm_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A part imports only from parts in lines above its own.
ORDER = [
    ("errors", "allocator", "plain_png", "bars", "muon", "resuming"),
    ("randomness", "images", "runs", "peers"),
    ("labelled_grid",),
    ("networks", "diffusion", "data", "checkpoints"),
    ("samplers", "nonfinite", "coding"),
    ("denoiser",),
    ("module",),
    ("metrics", "interop"),
    ("callbacks",),
    ("commands",),
    ("cli",),
]
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}
WITH_LIGHTNING = {"module", "data", "callbacks", "cli", "commands"}


def part_of(path: Path) -> str:
    """The module or subpackage right under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


PARTS = [path for path in FILES if part_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", PARTS, ids=ids)
def test_dependencies_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in LEVELS, f"{part}: give it a place in ORDER"
    for name in imported(path):
        root, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if root == "ddpm_lightning" and other != part:
            assert other in LEVELS, f"{path} imports {name}"
            assert LEVELS[other] < LEVELS[part], f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_some_parts_know_lightning(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imported(path)}
    assert part_of(path) in WITH_LIGHTNING or not roots & {"lightning", "pytorch_lightning"}


def test_the_entry_point_needs_the_standard_library_alone() -> None:
    roots = {name.partition(".")[0] for name in imported(PACKAGE / "__main__.py")}
    assert roots == {"sys", "difflib", "importlib", "typing", "ddpm_lightning"}


def test_only_the_entry_point_names_the_command_line() -> None:
    naming = [path.name for path in FILES if "ddpm_lightning.cli" in path.read_text()]
    assert naming == ["__main__.py"]


def test_nothing_is_a_utility() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc")]


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_range_arithmetic_is_in_images_alone(path: Path) -> None:
    if path.name == "images.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            operands = [node.value] if isinstance(node, ast.AugAssign) else [node.left, node.right]
            values = [operand.value for operand in operands if isinstance(operand, ast.Constant)]
            assert not {127.5, 255} & {v for v in values if isinstance(v, int | float)}, (
                f"{path}:{node.lineno}: {ast.unparse(node)}"
            )
