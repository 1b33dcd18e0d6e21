"""The benchmark rows about quality, on a run of ten steps."""

from pathlib import Path

import pytest

from benchmarks import quality
from tests.command_line import train


@pytest.mark.slow
def test_distances_of_few_evaluations(pictures: Path, tmp_path: Path) -> None:
    run = train(tmp_path, pictures)
    found = quality.distances(run, num_images=8, ancestral=15)
    assert sorted(found) == [10, 15, 20]
    assert all(distance > 0 for distance in found.values())
    assert quality.distances(run, num_images=8, ancestral=15) == found  # judged before


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"docs/fashion\.md says how"):
        quality.distances(tmp_path, num_images=8)
