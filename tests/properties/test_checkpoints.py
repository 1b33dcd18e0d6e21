"""Checkpoints, damaged and rewritten: each command reads what was written, or says one line."""

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from ddpm_lightning import DDPM
from ddpm_lightning.checkpoints import load_checkpoint, seal
from ddpm_lightning.errors import InputError
from tests.extractors import Small
from tests.properties.cases import Cases
from tests.properties.damage import damages
from tests.properties.sandbox import Sandbox, sandbox
from tests.training import assert_same, load

pytestmark = pytest.mark.usefixtures("one_thread")

Content = dict[str, Any]
Path_ = tuple[Any, ...]


# --- who reads checkpoints -----------------------------------------------------------------------


def from_python(box: Sandbox) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(box.here)
        try:
            DDPM.from_checkpoint("case.ckpt")
        except InputError as error:
            assert "case.ckpt" in str(error)
            assert "\n" not in str(error)
            return True
    return False


def command(name: str, *options: object) -> Callable[[Sandbox], bool]:
    def run(box: Sandbox) -> bool:
        result = box.run(name, *map(str, options))
        assert result is not None, "no case takes long"
        return result.status != 0

    run.__name__ = name
    return run


def readers(source: Path) -> list[Callable[[Sandbox], bool]]:
    extractor = f"{Small.__module__}.{Small.__name__}"
    config = ("--config", "tiny.yaml", "--trainer.max_steps", 12)
    few = ("--accelerator", "cpu", "--num_images", 2, "--num_steps", 2)
    return [
        from_python,
        command("sample", "case.ckpt", *few, "--out", "out"),
        command("fit", *config, "--ckpt_path", "case.ckpt"),
        command("validate", *config, "--ckpt_path", "case.ckpt"),
        command("fid", "case.ckpt", *few, "--extractor", extractor, "--reference", source),
    ]


# --- damaged files -------------------------------------------------------------------------------


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def endless() -> list[Any]:
    nest: list[Any] = []
    nest.append(nest)
    return nest


def zipped(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", data)
    return file.getvalue()


def foreign_files() -> list[bytes]:
    """Files that are something else, some of which are made to be a burden."""
    head = {"format_version": 2, "state_dict": {}, "hyper_parameters": {}, "global_step": 1}
    huge = torch.zeros(1).expand(2**20, 2**20)
    return [
        b"",
        b"text\n",
        b"PK\x05\x06" + bytes(18),
        pickle.dumps(head),
        pickle.dumps(b"x" * 1000)[:500],
        saved(None),
        saved([1, 2]),
        saved(head),
        saved({**head, "content_sha256": "0" * 64}),
        saved({**head, "format_version": 1}),
        saved({**head, "endless": endless()}),
        saved({**head, "huge": huge}),
        saved({**head, "sparse": torch.eye(2).to_sparse()}),
        saved({**head, "format_version": True}),
        saved({**head, "format_version": -1}),
        saved({**head, "format_version": 10**30}),
        saved({**head, "format_version": 1, "state_dict": {"huge": huge}}),
        saved(nn.Linear(1, 1)),
        saved(nn.Linear(1, 1).state_dict()),
        zipped(data_pkl=pickle.dumps(head), version=b"3\n", byteorder=b"little"),
        zipped(data_pkl=b"\x80\x02" + b"(" * 10**6, version=b"3\n"),
        zipped(data_pkl=bytes(2**28), version=b"3\n"),
    ]


def test_damaged_files(cases: Cases, pictures: Path, run: Path) -> None:
    """What is read from a damaged file, if anything, is what was written."""
    path = run / "checkpoints/last.ckpt"
    data, written = path.read_bytes(), load(path)
    all_readers = readers(pictures)

    def check(case: tuple[bytes, Callable[[Sandbox], bool]]) -> bool:
        damaged, read = case
        with sandbox(pictures) as box:
            (box.here / "case.ckpt").write_bytes(damaged)
            refused = read(box)
            if not refused:
                assert_same(load_checkpoint(box.here / "case.ckpt"), written)
            assert (box.here / "case.ckpt").read_bytes() == damaged
        return refused

    files = st.one_of(damages(data), damages(data), damages(data), st.sampled_from(foreign_files()))
    always = [(file, all_readers[i % 5]) for i, file in enumerate(foreign_files())]
    cases.run(st.tuples(files, st.sampled_from(all_readers)), check, always=always)


# --- other content -------------------------------------------------------------------------------


def paths(content: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The paths to all values of a nest, of weights and optimizer states the first two only."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for index, (key, value) in enumerate(items):
        if index >= 2 and path and path[-1] in ("state_dict", "ema_state_dict", "state"):
            break
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


plain = st.sampled_from([None, True, -1, 0, 1, 2**31, 10**30, 2.5, float("nan"), "x", "", b"x"])
others = st.one_of(plain, st.sampled_from([[], {}, [1], {"x": 1}, {1: []}, torch.zeros(2, 3)]))


def reshaped(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same tensor in other shapes, types and layouts, and with a value that is not finite."""
    spoilt = tensor.clone().double()
    spoilt.view(-1)[0] = float("nan")
    return [
        tensor[None],
        tensor.flatten()[:-1],
        tensor.double(),
        tensor.long(),
        tensor.to(torch.complex64),
        tensor.bool(),
        tensor.half(),
        spoilt.to(tensor.dtype),
        tensor.to_sparse(),
        torch.empty(0),
    ]


class Change(NamedTuple):
    """One value of a checkpoint gone, another, of another shape, or one more beside it."""

    kind: str
    path: Path_
    value: Any

    def made_in(self, written: Content) -> Content:
        """Give what a checkpoint holds then."""
        content: Content = copied(written)
        node: Any = content
        *path, key = self.path
        for part in path:
            node = node[part]
        if self.kind == "gone":
            del node[key]
        elif self.kind == "more" and isinstance(node, dict):
            node[f"{key}.x"] = self.value
        elif self.kind == "more":
            node.append(self.value)
        else:
            node[key] = self.value
        return content


@st.composite
def changes(draw: st.DrawFn, written: Content) -> Change:
    top = [(key,) for key in written]
    inner = list(paths(written))
    path = draw(st.sampled_from(top) | st.sampled_from(inner) | st.sampled_from(inner))
    value: Any = written
    for part in path:
        value = value[part]
    kind = draw(st.sampled_from(["gone", "other", "other", "shape", "more"]))
    is_tensor = kind == "shape" and isinstance(value, torch.Tensor)
    return Change(kind, path, draw(st.sampled_from(reshaped(value)) if is_tensor else others))


def is_only_sealed(path: Path_) -> bool:
    """Whether nothing but the digest tells that a value is wrong, until some step needs it.

    What an optimizer keeps is known to it alone; Lightning's counters count without a look.
    """
    return len(path) > 1 and path[0] in ("optimizer_states", "loops")


def copied(value: Any) -> Any:
    """A copy of a nest; its tensors are the same."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def test_other_content(cases: Cases, pictures: Path, run: Path) -> None:
    """With the digest of before it is refused; with one of its own it is used or refused."""
    written = load(run / "checkpoints/last.ckpt")
    all_readers = readers(pictures)

    def check(case: tuple[Change, Callable[[Sandbox], bool]]) -> bool:
        change, read = case
        content = change.made_in(written)
        with sandbox(pictures) as box:
            path = box.here / "case.ckpt"
            torch.save(content, path)
            with pytest.raises(InputError, match="case.ckpt"):
                load_checkpoint(path)
            # nothing sparse can be sealed
            is_sparse = isinstance(change.value, torch.Tensor) and change.value.is_sparse
            if is_only_sealed(change.path) or is_sparse:
                return True
            seal(content)
            torch.save(content, path)
            return read(box)

    cases.run(st.tuples(changes(written), st.sampled_from(all_readers)), check)
