"""Files of options, right and wrong: `fit` does what they say, or says in one line why not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.command_line import TINY
from tests.properties.cases import Cases
from tests.properties.sandbox import sandbox

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = TINY.replace("max_steps: 10", "max_steps: 2").replace("{source}", '"{source}"')

# What a value may be replaced by: every type of YAML, and what only YAML has.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 2**31, 10**30]),
    st.floats(),
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=8),
    st.dates(),
    st.binary(max_size=5),
)
nests = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(scalars, inner, max_size=3)
    ),
    max_leaves=6,
)

# Files that are remarkable as a whole.
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE = (
    b"",
    b"\n \n",
    b"# nothing\n",
    b"---\n",
    b"---\n---\n",
    b"null\n",
    b"3\n",
    b"- a\n- b\n",
    b"[]\n",
    b"{}\n",
    b"text\n",
    b"\t\n",
    b"trainer:\n\tmax_steps: 2\n",
    b"trainer: {max_steps: 2}\n---\ntrainer: {max_steps: 2}\n",
    b"trainer: {max_steps: 1}\ntrainer: {max_steps: 2}\n",
    b"trainer: {max_steps: 1, max_steps: 2}\n",
    b"trainer: &t {max_steps: 2}\nsamples: *t\n",
    b"trainer: &t\n  <<: *t\n",
    b"a: &a {a: *a}\n",
    b"base: &b {max_steps: 2}\ntrainer: {<<: *b}\n",
    b"<<: {trainer: {max_steps: 2}}\n",
    b"<<: 3\n",
    b"? [a, b]\n: c\n",
    b"1: 2\n",
    b"null: 2\n",
    b"? {a: b}\n",
    b"data: !!python/object/apply:os.system ['touch pwned']\n",
    b"!!python/object/apply:os.system ['touch pwned']\n",
    b"data: !include other.yaml\n",
    b"config: tiny.yaml\n",
    b"print_config: true\n",
    b"fit: {trainer: {max_steps: 2}}\n",
    b"help: true\n",
    b"data: {seed: 3}\n",
    b'data: {source: "\\0"}\n',
    b'run_dir: "a\\0b"\n',
    b'experiment: "\\uD800"\n',
    b"experiment: ../../x\n",
    b"\xef\xbb\xbftrainer: {max_steps: 2}\n",
    "trainer: {max_steps: 2}\n".encode("utf-16"),
    b"\xff\xfe\x00",
    b"trainer: {max_steps: 2}\r\n",
    b"[" * 3000,
    b"{a: " * 3000,
    b"- " * 3000,
    b"{a: " * 1000 + b"1" + b"}" * 1000,
    b"trainer: " + b"[" * 1000 + b"]" * 1000,
    b'trainer: {max_steps: "1\0"}\n',
    b"trainer:\n  max_steps: " + b"9" * 5000 + b"\n",
    LAUGHS.encode(),
    (LAUGHS + "data: {source: *i}\n").encode(),
    (LAUGHS + "trainer: {callbacks: *i}\n").encode(),
)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of nested dictionaries."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths(value, (*path, key))


@st.composite
def other_structures(draw: st.DrawFn) -> bytes:
    """The file with another value, another key or one key less somewhere."""
    tree: Any = yaml.safe_load(TEXT)
    for _ in range(draw(st.integers(1, 2))):
        *path, key = draw(st.sampled_from(list(paths(tree))))
        node = tree
        for part in path:
            node = node[part]
        change = draw(st.sampled_from(["value", "value", "key", "both", "gone", "moved"]))
        if change == "value":
            node[key] = draw(nests)
        elif change == "key":
            place = draw(st.integers(0, len(str(key)) - 1))
            node[str(key)[:place] + str(key)[place + 1 :]] = node.pop(key)
        elif change == "both":
            node[draw(scalars)] = draw(nests)
        elif change == "gone":
            del node[key]
        else:
            tree[key] = node.pop(key)
    return yaml.safe_dump(tree, allow_unicode=True).encode()


@st.composite
def other_texts(draw: st.DrawFn) -> bytes:
    """The file with a few characters or lines changed, or cut."""
    data = TEXT.encode()
    lines = data.splitlines(keepends=True)
    first, second = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    place = draw(st.integers(0, len(data) - 1))
    change = draw(st.sampled_from(["cut", "byte", "insert", "twice", "swap", "tabs", "indent"]))
    if change == "cut":
        return data[:place]
    if change == "byte":
        return data[:place] + draw(st.binary(min_size=1, max_size=1)) + data[place + 1 :]
    if change == "insert":
        odd = st.sampled_from([b"\t", b"'", b'"', b"{", b"[", b"*a ", b"&a ", b"- ", b": ", b"!x "])
        return data[:place] + draw(odd) + data[place:]
    if change == "twice":
        lines.insert(second, lines[first])
    elif change == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    elif change == "tabs":
        lines[first] = lines[first].replace(b"  ", b"\t")
    else:
        lines[first] = b"  " + lines[first]
    return b"".join(lines)


random_files = st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode))
files = st.one_of(
    other_structures(), other_structures(), other_texts(), st.sampled_from(WHOLE), random_files
)


def test_configs(cases: Cases, pictures: Path) -> None:
    def check(data: bytes) -> bool:
        with sandbox(pictures) as box:
            base, _, _ = data.partition(b"{source}")
            path = box.here / "case.yaml"
            path.write_bytes(data.replace(b"{source}", str(pictures).encode()))
            options = [] if base != data else ["--config", "tiny.yaml"]
            result = box.run("fit", *options, "--config", "case.yaml", "--trainer.accelerator=cpu")
            assert not (box.here / "pwned").exists()
            assert not box.written_beside()
        return result is not None and result.status != 0

    cases.run(files, check, always=WHOLE if cases.are_many else ())
