"""Options, right and wrong: a command does what they say, or says in one line why not."""

import inspect
import re
import sys
from argparse import Action
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from jsonargparse import capture_parser

from ddpm_lightning import UNet
from ddpm_lightning.cli import CLI
from ddpm_lightning.commands.fid import fid
from ddpm_lightning.commands.sample import sample
from tests.extractors import Small
from tests.properties.cases import Cases
from tests.properties.sandbox import Sandbox, sandbox

pytestmark = pytest.mark.usefixtures("one_thread")

# Of all types and of none. None of them is an absolute path: tests write to their own folder.
VALUES = (
    *("many", "", " ", "null", "true", "false", "auto", "-1", "0", "1", "2", "3", "2.5", "-0.0"),
    *("1e400", "nan", "-inf", "1e-400", "1_000", "0x10", "1,2", "-", "--", "---", "=", "a=b"),
    *("2147483648", "9" * 30, "9" * 5000, "[]", "[1]", "[1, 2, 3]", "[[]]", "[", "]", "{}", "{"),
    *("{a: b}", "{class_path: x}", "{class_path: torch.optim.SGD, init_args: {lr: 1}}", "[null]"),
    *(
        "{[]: 1}",
        "!!python/object/apply:os.system [touch pwned]",
        "!!binary x",
        "*a",
        "&a",
        "<<",
        "@",
    ),
    *(
        "%s%n",
        "日本語",
        "a\nb",
        "\t",
        "a\udcff",
        "\x1b[31m",
        "x" * 5000,
        "'",
        '"',
        "\\",
        "#",
        ": ",
        "{0}",
    ),
    *("..", "../..", ".", "~", "$HOME", "tiny.yaml", "tiny.yaml/x", "whole.ckpt", "runs", "new/x"),
    *("torch.nn.Linear", "torch.optim.SGD", "os.system", "builtins.print", "ddpm_lightning.UNet"),
    *("http://127.0.0.1:9/x", "hf://a/b", "owner/name", "digits", "*", "?", "digits:x"),
)


def fit_parser() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddpm_lightning", "fit"])
        parser: Any = capture_parser(CLI)
    (commands,) = (action for action in parser._actions if isinstance(action.choices, dict))
    return commands.choices["fit"]


def is_option(action: Action) -> bool:
    """Whether it can be given: neither some help nor what another option sets."""
    return bool(action.option_strings) and not re.search("help$|->", action.option_strings[-1])


FIT = [
    *(action.option_strings[-1] for action in fit_parser()._actions if is_option(action)),
    *(f"--model.net.{name}" for name in inspect.signature(UNet).parameters),
    *(f"--model.optimizer.{name}" for name in ("lr", "betas", "eps", "weight_decay", "fused")),
]
SAMPLE = [f"--{name}" for name in inspect.signature(sample).parameters if name != "checkpoint"]
# the self-test takes half a minute, and has a test of its own
NOT_HERE = ("subjects", "selftest")
JUDGE = [f"--{name}" for name in inspect.signature(fid).parameters if name not in NOT_HERE]

Line = tuple[str, ...]


@st.composite
def lines(draw: st.DrawFn, keys: list[str]) -> Line:
    """One or two options, each right or wrong in its own way."""
    words: list[str] = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        key = draw(st.sampled_from(keys))
        value = draw(st.one_of(st.sampled_from(VALUES), values))
        place = draw(st.integers(2, len(key) - 1))
        words += draw(
            st.sampled_from(
                [
                    [key, value],
                    [f"{key}={value}"],
                    [f"{key}={value}"],
                    [f"{key}={value}"],
                    [key],
                    [key[:place] + key[place + 1 :], value],
                    [f"{key}.{key[2:]}", value],
                    [f"{key}+={value}"],
                    [value],
                ]
            )
        )
    return tuple(words)


values = st.one_of(
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=8),
    st.integers(-(2**40), 2**40).map(str),
    st.floats().map(str),
)


def wrong_for_each(keys: list[str]) -> list[Line]:
    """Each option with what hardly any of them is."""
    return [(f"{key}=[[]]",) for key in keys]


def run_cases(
    cases: Cases,
    keys: list[str],
    run: Callable[[Sandbox, Line], bool],
    source: Path,
    checkpoint: Path | None = None,
) -> None:
    def check(line: Line) -> bool:
        with sandbox(source, checkpoint) as box:
            return run(box, line)

    cases.run(lines(keys), check, always=wrong_for_each(keys) if cases.are_many else ())


def test_fit(cases: Cases, pictures: Path) -> None:
    def run(box: Sandbox, line: Line) -> bool:
        result = box.run("fit", "--config", "tiny.yaml", *line)
        if not any("cache_dir" in word for word in line):
            assert not box.written_beside()
        return result is not None and result.status != 0

    run_cases(cases, FIT, run, pictures)


def test_sample(cases: Cases, pictures: Path, run: Path) -> None:
    def run_sample(box: Sandbox, line: Line) -> bool:
        result = box.run("sample", "whole.ckpt", "--num_images=2", "--accelerator=cpu", *line)
        return result is not None and result.status != 0

    run_cases(cases, SAMPLE, run_sample, pictures, run / "checkpoints/last.ckpt")


def test_fid(cases: Cases, pictures: Path, run: Path) -> None:
    extractor = f"{Small.__module__}.{Small.__name__}"
    base = ("--num_images=2", "--accelerator=cpu", f"--reference={pictures}", "--num_steps=2")

    def run_fid(box: Sandbox, line: Line) -> bool:
        result = box.run("fid", "whole.ckpt", f"--extractor={extractor}", *base, *line)
        return result is not None and result.status != 0

    run_cases(cases, JUDGE, run_fid, pictures, run / "checkpoints/last.ckpt")
