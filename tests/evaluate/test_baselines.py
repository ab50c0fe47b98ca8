"""Simple features: their definitions, and that the choice among them sees training pictures only."""

import numpy as np
import pytest
import torch
from skimage.feature import hog as skimage_hog

from hjepa.data.images import normalised
from hjepa.evaluate.baselines import baselines, best_side, colour_histogram, hog
from hjepa.evaluate.readers import leave_one_out_knn
from hjepa.evaluate.transfer import resolution_transfer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def colours(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_colour_histogram_is_the_square_root_of_numpys():
    raw = colours(3, 16)
    found = colour_histogram(16, MEAN, STD)(normalised(raw, MEAN, STD))
    for row, image in zip(found, raw, strict=True):
        pixels = image.flatten(1).T.numpy() / 255
        counts, _ = np.histogramdd(pixels, bins=6, range=[(0, 1)] * 3)
        torch.testing.assert_close(row.double() ** 2, torch.from_numpy(counts).flatten() / 256, rtol=0, atol=1e-6)


def test_hog_is_scikit_images_on_the_grey_picture():
    raw = colours(2, 32)
    found = hog(32, MEAN, STD)(normalised(raw, MEAN, STD))
    for row, image in zip(found, raw, strict=True):
        truth = skimage_hog(image.double().mean(0).numpy() / 255, 9, (8, 8), (2, 2))
        torch.testing.assert_close(row.double(), torch.from_numpy(truth), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [hog, colour_histogram])
def test_a_picture_of_another_size_is_read_at_the_training_size(make):
    smooth = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)
    feature = make(32, MEAN, STD)
    halved = torch.nn.functional.avg_pool2d(smooth, 2)
    assert feature(smooth).shape == feature(halved).shape
    assert (feature(smooth) - feature(halved)).norm() < 0.15 * feature(halved).norm()


def test_hog_of_pictures_smaller_than_two_cells_has_one_block_and_of_less_than_a_cell_is_refused():
    assert hog(8, MEAN, STD)(normalised(colours(2, 8), MEAN, STD)).shape == (2, 9)
    with pytest.raises(ValueError, match="training size of at least 8 px"):
        hog(6, MEAN, STD)


def test_the_thumbnail_has_the_side_that_shows_what_tells_the_training_pictures_apart():
    """Fine stripes under blots of 8 px are nearly grey at 4 px; halves of the picture under fine noise ask for 4 px."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    stripes = ((torch.arange(32) // 2) % 2 * 2.0 - 1).expand(32, 32)
    fine = torch.stack([stripes if label else stripes.T for label in labels])[:, None].expand(-1, 3, -1, -1)
    blots = torch.randn(120, 3, 4, 4, generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert best_side(fine + blots, labels, (4, 8, 32)) == 32
    halves = (torch.arange(32) // 16 * 2.0 - 1).expand(32, 32)
    coarse = torch.stack([halves if label else halves.T for label in labels])[:, None].expand(-1, 3, -1, -1)
    noise = torch.randn(coarse.shape, generator=g)
    assert best_side(0.2 * coarse + 3 * noise, labels, (4, 32)) == 4


def test_leaving_one_out_equals_loops_over_all_other_pictures():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g).double(), torch.randint(3, (40,), generator=g)
    rows = x - x.mean(0)
    expected = []
    for i in range(40):
        cosine = torch.nn.functional.cosine_similarity(rows[i], rows, dim=1)
        others = sorted((j for j in range(40) if j != i), key=lambda j: -float(cosine[j]))[:5]
        votes = [sum(float((cosine[j] / 0.07).exp()) for j in others if y[j] == label) for label in range(3)]
        expected.append(max(range(3), key=votes.__getitem__) == y[i])
    assert 5 < sum(expected) < 35
    assert leave_one_out_knn(x, y, k=5).tolist() == expected


class Stripes:
    """Two classes of noisy stripes, with the constants that a data set has."""

    mean, std = MEAN, STD

    def __init__(self, n: int, seed: int):
        self.labels, self.seed = torch.arange(n) % 2, seed

    def __len__(self):
        return len(self.labels)

    def at_size(self, size, indices=None):
        size = size if isinstance(size, int) else size[0]
        bars = (torch.arange(size) * 8 // size % 2 * 120.0).expand(size, size)
        images = torch.stack([bars if label else bars.T for label in self.labels])[:, None].expand(-1, 3, -1, -1)
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(self.seed)) * 100
        chosen = normalised((images + noise).to(torch.uint8), MEAN, STD)
        return chosen if indices is None else chosen[indices]


def test_baselines_are_read_like_encoders_at_every_size():
    train, test = Stripes(60, 0), Stripes(40, 1)
    readers = baselines(train, 32, gallery=40)
    assert list(readers) == ["raw pixels", "colour histogram", "HOG"]
    rows = resolution_transfer(readers, train, test, train_size=32, sizes=[16, 64], refit=False)
    found = {(row["encoder"], row["size"][0]): row["value"] for row in rows if row["metric"] == "probe"}
    assert {found["HOG", size] for size in (32, 64)} == {1.0} and found["raw pixels", 64] == 1
    assert found["colour histogram", 32] < 0.75  # both classes have the same colours
