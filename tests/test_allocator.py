import os
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ddpm_lightning import __main__ as entry
from ddpm_lightning import cli
from ddpm_lightning.__main__ import COMMANDS
from ddpm_lightning.allocator import keep_freed_memory, return_freed_memory
from tests.command_line import TINY
from tests.training import command_line

# Takes and frees 64 MiB, which glibc by itself always hands back, and counts the pages that the
# system had to provide.
COUNT = """
import resource
from ddpm_lightning.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(b"x") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

is_kept = keep_freed_memory()
faults()
print(is_kept, faults())
"""

# The same where what is freed are holes among what is in use: blocks below the size that glibc maps
# by itself, every second of them freed.
HOLES = """
import re
from ddpm_lightning.allocator import return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

blocks = [bytearray(b"x") * 2**16 for _ in range(1024)]
del blocks[::2]
before = resident()
print(return_freed_memory(), round(before - resident()))
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")


def count(code: str = COUNT, **environment: str) -> tuple[str, int]:
    theirs = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    is_done, number = output.split()
    return is_done, int(number)


@glibc
def test_freed_memory_is_kept_unless_the_user_has_settings() -> None:
    is_kept, kept = count()
    is_left, left = count(MALLOC_ARENA_MAX="2")
    assert (is_kept, is_left) == ("True", "False")
    assert count(GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"
    assert left > 20 * max(kept, 1)


@glibc
def test_holes_go_back_unless_the_user_has_settings() -> None:
    is_returned, megabytes = count(HOLES)
    assert is_returned == "True"
    assert 24 <= megabytes <= 34  # of 32, but for what shares a page with a block in use
    assert count(HOLES, MALLOC_ARENA_MAX="2")[0] == "False"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
    assert not return_freed_memory()


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"fit"}))
def test_every_other_command_keeps_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module, _, function = COMMANDS[command][0].partition(":")
    monkeypatch.setattr(sys, "argv", ["ddpm_lightning", command])
    monkeypatch.setattr(entry, "keep_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(import_module(module), function, lambda: calls.append(command))
    entry.main()
    assert calls == ["memory", command]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fit_keeps_it_unless_the_network_works_in_pieces(
    checkpointing: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "keep_freed_memory", lambda: calls.append("entry"))
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append("fit"))
    Path("tiny.yaml").write_text(TINY.format(source=pictures))
    options = ("--config", "tiny.yaml", "--trainer.max_steps", "1", "--samples.every_n_steps", "0")
    with command_line("fit", *options, "--model.net.checkpointing", checkpointing):
        assert entry.main() == 0
    assert calls == ([] if checkpointing else ["fit"])
