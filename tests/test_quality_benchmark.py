"""The benchmark rows about quality, on a run of ten steps that they train."""

from pathlib import Path

import pytest

from benchmarks import quality
from tests.command_line import TINY, tree


@pytest.mark.slow
def test_distances_of_few_evaluations(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "NUM_IMAGES", 8)
    monkeypatch.setattr(quality, "SAMPLERS", "ddim,heun:3,ddpm:15")
    monkeypatch.setattr(quality, "NUM_STEPS", "5,10")
    monkeypatch.setattr(
        quality, "write_reference", lambda folder: folder.exists() or folder.symlink_to(pictures)
    )
    (tmp_path / "tiny.yaml").write_text(TINY.format(source=pictures))
    monkeypatch.setattr(quality, "EXPERIMENT", tmp_path / "tiny.yaml")
    monkeypatch.setattr(quality, "SOURCE", str(pictures))
    run = tmp_path / "run"
    found, where = quality.distances(run)
    assert sorted(found) == [("ddim", 5), ("ddim", 10), ("ddpm", 15), ("heun", 4)]
    assert all(distance > 0 for distance in found.values())
    (run / "checkpoints/step=10.ckpt").unlink()
    records = tree(run / "evaluations/records")
    assert quality.distances(run) == (found, where)  # neither trained nor judged again
    assert tree(run / "evaluations/records") == records
    assert not (run / "checkpoints/step=10.ckpt").exists()


def test_the_best_sampler_has_as_many_evaluations_as_asked_for() -> None:
    found = {("ddim", 10): 3.0, ("heun", 10): 2.0, ("ddpm", 250): 1.0, ("ddim", 20): 2.5}
    assert quality.best(found, 10) == ("heun", 2.0)
    assert quality.best(found, 20) == ("ddim", 2.5)
