"""What a number stands on, and the self-test of an installation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import record as under_test
from ddpm_lightning.metrics import selftest
from ddpm_lightning.metrics.record import (
    Record,
    describe_sampler,
    make_protocol,
    make_record,
    protocol_differences,
    read_record,
    sampler_slug,
    unusual_options,
    write_record,
)
from ddpm_lightning.samplers import Sampler, make_sampler
from tests.extractors import small

CPU = torch.device("cpu")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def record_of(num_images: int = 50, **protocol: Any) -> Record:
    reference = {
        "name": "digits",
        "images_sha256": "ab",
        "num_images": 90,
        "image_shape": [1, 8, 8],
    }
    protocol = {"reference": reference, **small().protocol, **protocol}
    protocol = make_protocol(num_images, protocol)
    return make_record(
        {"fd_Small": 1 / 3}, num_images, protocol, {"step": 3}, 1.23456, CPU, ["few"]
    )


def test_records_survive_writing(tmp_path: Path) -> None:
    record, path = record_of(), tmp_path / "new" / "folder" / "record.json"
    write_record(path, record)
    assert read_record(path) == record
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    assert path.read_text().endswith("}\n")


def test_a_record_has_all_that_a_number_stands_on() -> None:
    record = record_of()
    assert record.keys() == {
        *("record_version", "metrics", "num_images"),
        *("protocol", "subject", "environment", "warnings"),
    }
    assert record["protocol"].keys() == {
        *("num_images", "quantisation", "methods", "reference"),
        *("extractor", "layer", "resizer", "weights_sha256", "source_sha256"),
    }
    assert record["protocol"]["methods"].keys() == {"fd", "kid", "is", "prc"}
    environment = record["environment"]
    assert environment["seconds"] == 1.235
    assert environment["versions"].keys() >= {"python", "ddpm-lightning", "torch-fidelity"}
    assert environment["threads"] == 1
    assert environment["device"] == "cpu"


def test_the_commit_is_that_of_this_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(under_test.__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert record_of()["environment"]["git_commit"] == head
    # installed into an environment that lies in a user's own repository
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    installed = tmp_path / "venv" / "ddpm_lightning" / "metrics" / "record.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(under_test, "__file__", str(installed))
    assert record_of()["environment"]["git_commit"] is None
    monkeypatch.setenv("PATH", "")
    assert record_of()["environment"]["git_commit"] is None


def test_the_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "fid", "a b.ckpt"])
    assert record_of()["environment"]["command"] == "main.py fid 'a b.ckpt'"


def test_samplers_are_described_by_all_that_they_do() -> None:
    assert describe_sampler(make_sampler("ddim", 20), 20) == {
        "name": "ddim",
        "num_steps": 20,
        "eta": 0.0,
        "spacing": "even",
        "clip": "static",
    }
    assert describe_sampler(make_sampler("ddpm", None), 1000)["num_steps"] == 1000


@pytest.mark.parametrize(
    ("sampler", "num_steps", "slug", "unusual"),
    [
        (make_sampler("ddpm"), 1000, "ddpm-1000", []),
        (make_sampler("ddim", eta=1.0), 50, "ddim-50-eta1", ["eta 1"]),
        (make_sampler("dpmpp_2m_sde"), 20, "dpmpp_2m_sde-20", []),
        (make_sampler("heun", spacing="even"), 10, "heun-10-even", ["even"]),
        (
            make_sampler("ddim", None, 0.5, "10,15,20", "dynamic"),
            45,
            "ddim-45-eta0.5-10,15,20-clipdynamic",
            ["eta 0.5", "10,15,20", "clip dynamic"],
        ),
    ],
)
def test_samplers_are_named_by_what_is_not_their_default(
    sampler: Sampler, num_steps: int, slug: str, unusual: list[str]
) -> None:
    description = describe_sampler(sampler, num_steps)
    assert sampler_slug(description) == slug
    assert unusual_options(description) == unusual
    # as it is read from a file
    assert unusual_options(json.loads(json.dumps(description))) == unusual


def test_records_from_before_there_were_options_are_read() -> None:
    old = {"name": "ddim", "num_steps": 20, "eta": 0.5, "clip": True}
    assert unusual_options(old) == ["eta 0.5"]
    assert sampler_slug(old) == "ddim-20-eta0.5"


# --- comparing -----------------------------------------------------------------------------------


def test_equal_protocols_may_be_compared(tmp_path: Path) -> None:
    ours, theirs = record_of(), record_of()
    theirs["subject"], theirs["metrics"], theirs["environment"] = {"step": 9}, {}, {}
    theirs["protocol"]["reference"]["name"] = "a folder with the same images"
    write_record(tmp_path / "record.json", theirs)
    assert protocol_differences(ours, read_record(tmp_path / "record.json")) == []


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (record_of(60), ["num_images: 50, 60"]),
        (record_of(layer="64"), ["layer: output, 64"]),
        (record_of(more=1), ["more: None, 1"]),
        (record_of(61, resizer="x"), ["num_images: 50, 61", "resizer: its own, x"]),
        (
            record_of(reference={"name": "digits", "images_sha256": "cd"}),
            [
                "reference.image_shape: [1, 8, 8], None",
                "reference.images_sha256: ab, cd",
                "reference.num_images: 90, None",
            ],
        ),
    ],
)
def test_differences_are_listed(theirs: Record, told: list[str]) -> None:
    assert protocol_differences(record_of(), theirs) == told
    assert len(protocol_differences(theirs, record_of())) == len(told)


@pytest.mark.parametrize("text", [None, "", "{", "5", "[]", '"record"', "{}", '{"metrics": {}}'])
def test_what_is_no_record_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="record.json: no") as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_a_record_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no record of a metric"):
        read_record(tmp_path / "record.json")


def test_a_failing_write_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_record(path, record_of())
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_record(path, record_of(70))
    assert path.read_bytes() == before
    assert json.loads(before)["num_images"] == 50


# --- the self-test -------------------------------------------------------------------------------


def test_this_installation_is_right() -> None:
    lines: list[str] = []
    assert selftest.run(lines.append) == 0
    assert lines[-1] == f"all {len(lines) - 1} checks passed"
    assert all(line.startswith("ok ") for line in lines[:-1])
    for what in ("Gaussians", "to itself", "shares", "torch-fidelity", "kid", "recall"):
        assert any(what in line for line in lines), what


def broken_svdvals(matrix: Tensor) -> Tensor:
    return torch.linalg.svd(matrix).S * 1.001  # type: ignore[no-any-return]


def broken_interpolate(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("path", "broken", "what"),
    [
        ("torch.linalg.svdvals", broken_svdvals, "Gaussians"),
        ("ddpm_lightning.metrics.judge.KID_SUBSETS", 0, "kid"),  # nan
        ("torch.nn.functional.interpolate", broken_interpolate, "RuntimeError: no kernel"),
    ],
)
def test_a_broken_installation_is_told(
    path: str, broken: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path, broken)
    lines: list[str] = []
    assert selftest.run(lines.append) == 1
    assert any(line.startswith("WRONG ") and what in line for line in lines), lines
    assert "do not trust numbers of this installation" in lines[-1]
