"""Nearest neighbours against all distances at once."""

import pytest
import torch

from ddpm_lightning.metrics.neighbours import NeighbourSearch


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_equals_a_search_in_all_distances(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 12, generator=generator)
    rows = torch.randn(40, 12, generator=generator)
    search = NeighbourSearch(queries, 3)
    for part in torch.split(rows, batch_size):
        search.add(part)
    found = search.finish()
    expected = torch.cdist(
        queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).sort(dim=1)
    assert torch.equal(found.indices, expected.indices[:, :3])
    torch.testing.assert_close(found.distances, expected.values[:, :3], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found.in_grey_levels(12).distances, expected.values[:, :3] / 12**0.5, rtol=1e-12, atol=0
    )


def test_distances_between_images_are_exact() -> None:
    """Their squares are whole numbers beyond float32's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 50_000), generator=generator, dtype=torch.uint8)
    search = NeighbourSearch(images, 6)
    search.add(images)
    found = search.finish()
    assert torch.equal(found.indices[:, 0], torch.arange(6))
    assert torch.equal(found.distances[:, 0], torch.zeros(6, dtype=torch.float64))
    for query in range(6):
        differences = images[query].long() - images[found.indices[query]].long()
        squares = differences.square().sum(dim=1)
        assert squares[-1] > 2**24
        assert torch.equal(found.distances[query], squares.double().sqrt())


def test_the_first_of_equals_is_taken() -> None:
    search = NeighbourSearch(torch.zeros(1, 2), 3)
    search.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    search.add(torch.tensor([[-1.0, 0.0], [0.0, 0.5]]))
    assert search.finish().indices.tolist() == [[3, 0, 1]]
    few = NeighbourSearch(torch.zeros(1, 2), 3)
    few.add(torch.ones(2, 2))
    assert few.finish().indices.tolist() == [[0, 1]]
