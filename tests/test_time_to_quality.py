"""The peers of the benchmark of training's first quarter of an hour, for one step each."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from ddpm_lightning.data.idx import open_idx

pytest.importorskip("denoising_diffusion_pytorch", reason="it comes with the extra `benchmark`")
from benchmarks import quality
from benchmarks import time_to_quality as benchmark

pytestmark = pytest.mark.slow  # of networks that are not small


@pytest.fixture(autouse=True)
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for Debian's package: 40 images."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    content = struct.pack(">4I", 0x0803, *pixels.shape) + pixels.tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(quality, "SOURCE", str(tmp_path))
    monkeypatch.setattr(quality, "NUM_REFERENCE", 30)
    monkeypatch.setattr(benchmark, "NUM_SAMPLES", 3)
    monkeypatch.setattr(benchmark, "BATCH_OF_SAMPLES", 2)
    monkeypatch.setattr(benchmark, "NUM_EVALUATIONS", 2)
    return tmp_path


@pytest.mark.parametrize("name", [*benchmark.PEERS, benchmark.HARDER])
def test_a_peer_trains_and_its_samples_are_of_the_images_size(name: str, tmp_path: Path) -> None:
    benchmark.train_peer(name, 1, tmp_path)
    files = sorted(tmp_path.glob(f"{name}-*.npz"))
    assert files
    for file in files:
        (images,) = np.load(file).values()
        assert images.shape == (3, 28, 28, 1)
        assert images.dtype == np.uint8


def test_the_reference_is_the_first_training_images(clothes: Path, tmp_path: Path) -> None:
    folder = quality.write_reference(tmp_path / "reference")
    split = open_idx(str(folder), folder).splits["train"]
    assert len(split) == 30
    written = np.frombuffer((folder / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    assert (written.reshape(30, 28, 28, 1) == quality.fashion_pixels()[:30]).all()


def test_steps_are_timed_once(tmp_path: Path) -> None:
    found = {"ours": {"seconds_per_step": 0.5, "steps": 7}}
    (tmp_path / "steps.json").write_text(json.dumps(found))
    assert benchmark.count_steps(tmp_path) == {"ours": 7}
