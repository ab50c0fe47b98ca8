"""Places read from patch tokens, on stand-ins whose tokens say where they are, or nothing."""

import pytest
import torch
from sklearn.metrics import r2_score

from hjepa.evaluate.dense import (
    RawPatches,
    centres,
    dense_transfer,
    matched,
    patches_apart,
    place_r2,
    place_reader,
)


def test_distances_between_grids_equal_loops_over_centres_on_non_square_grids():
    grid, home = (3, 8), (6, 4)
    found = patches_apart(grid, home)
    assert found.shape == (24, 24)
    for i in range(24):
        for j in range(24):
            row = (i // 8 + 0.5) / 3 - (j // 4 + 0.5) / 6
            column = (i % 8 + 0.5) / 8 - (j % 4 + 0.5) / 4
            assert float(found[i, j]) == pytest.approx(max(6 * abs(row), 4 * abs(column)), abs=1e-5)


def test_a_token_finds_the_home_token_of_largest_cosine_in_its_own_picture():
    g = torch.Generator().manual_seed(0)
    tokens, home = torch.randn(3, 6, 5, generator=g), torch.randn(3, 4, 5, generator=g)
    apart = torch.rand(6, 4, generator=g)
    found = matched(tokens, home, apart)
    for b in range(3):
        for i in range(6):
            cosine = torch.nn.functional.cosine_similarity(tokens[b, i], home[b], dim=1)
            assert found[b, i] == apart[i, int(cosine.argmax())]


class Places:
    """Tokens that say where they are: picture coordinates on a bow, with prefix tokens that are far off."""

    patch_size, num_prefix_tokens = 4, 1

    def __call__(self, images):
        grid = images.shape[-2] // 4, images.shape[-1] // 4
        place = centres(grid)
        tokens = torch.cat([place, 1 - place.square()], dim=1).expand(len(images), -1, -1)
        return torch.cat([torch.full((len(images), 1, 4), 1e6), tokens], dim=1)


class Constant(Places):
    def __call__(self, images):
        return super().__call__(images) * 0 + 1


class Noise:
    def __init__(self, n, seed):
        self.labels = torch.zeros(n, dtype=torch.int64)
        self.base = torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.labels)

    def at_size(self, size, indices=None):
        base = self.base if indices is None else self.base[indices]
        return torch.nn.functional.interpolate(base, size, mode="bilinear", antialias=True)


@pytest.fixture(scope="module")
def values():
    encoders = {"places": Places(), "constant": Constant(), "raw": RawPatches(4)}
    rows = dense_transfer(encoders, Noise(12, 0), Noise(10, 1), train_size=24, sizes=[12, 48, (24, 36)], tags={"s": 1})
    assert {(row["s"], row["n"]) for row in rows} == {(1, 10)}
    assert all(row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 for row in rows)
    return {(row["encoder"], row["size"], row["metric"]): row["value"] for row in rows}


def test_tokens_that_say_where_they_are_find_their_place_and_are_read_at_every_size(values):
    for size in ((24, 24), (12, 12), (48, 48), (24, 36)):
        assert values["places", size, "match_0"] > 0.95 and values["places", size, "place"] > 0.98
        assert values["raw", size, "place"] < 0.2
    assert values["raw", (24, 24), "match_0"] == 1  # at the training size each patch is its own nearest


def test_tokens_that_are_all_alike_know_nothing(values):
    for size in ((24, 24), (48, 48)):
        assert abs(values["constant", size, "place"]) < 1e-6
        assert values["constant", size, "match_0"] < 0.2


def test_chance_is_the_share_of_places_that_a_blind_draw_hits(values):
    for size, grid in (((24, 24), (6, 6)), ((48, 48), (12, 12)), ((12, 12), (3, 3))):
        for k in (0, 1, 2):
            hits = [
                max(abs((a + 0.5) * 6 / grid[0] - (c + 0.5)), abs((b + 0.5) * 6 / grid[1] - (d + 0.5))) <= k + 0.501
                for a in range(grid[0]) for b in range(grid[1]) for c in range(6) for d in range(6)
            ]  # fmt: skip
            assert values["chance", size, f"match_{k}"] == pytest.approx(sum(hits) / len(hits))


def test_r2_of_places_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    tokens = centres((4, 6)) @ torch.randn(2, 5, generator=g) + 0.3 * torch.randn(7, 24, 5, generator=g)
    reader = place_reader(tokens, (4, 6))
    truth = centres((4, 6)).repeat(7, 1).numpy()
    expected = r2_score(truth, reader.predict(tokens.flatten(0, 1).double().numpy()))
    assert float(place_r2(reader, tokens, (4, 6)).mean()) == pytest.approx(expected, abs=1e-6)
    assert 0.3 < expected < 0.95


def test_raw_patches_are_the_pixels_of_the_patch_in_row_major_order():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = RawPatches(2)(images)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4], images[1, :, 2:4, 2:4].flatten())


def test_an_encoder_without_patches_is_refused():
    with pytest.raises(ValueError, match="'pixels' has no patch_size"):
        dense_transfer({"pixels": lambda x: x.flatten(1)}, Noise(4, 0), Noise(4, 1), train_size=24, sizes=[])


def test_encoders_of_several_patch_sides_are_refused():
    """Chance and raw pixels have one side, and would be those of one encoder alone."""
    fine = Places()
    fine.patch_size = 2
    for pair in ({"coarse": Places(), "fine": fine}, {"coarse": Places(), "raw": RawPatches(2)}):
        with pytest.raises(ValueError, match=r"has patches of 2 px, 'coarse' of 4 px: .*; read them one by one"):
            dense_transfer(pair, Noise(4, 0), Noise(4, 1), train_size=24, sizes=[])


def test_places_are_not_read_in_a_single_row_or_column():
    """R^2 of what does not vary would be minus infinity."""
    rows = dense_transfer({"p": Places()}, Noise(4, 0), Noise(4, 1), train_size=24, sizes=[(4, 24), (24, 4), 4, 8])
    assert {row["size"] for row in rows if row["metric"] == "place"} == {(24, 24), (8, 8)}
    assert {row["size"] for row in rows if row["metric"] == "match_0"} == {(24, 24), (4, 24), (24, 4), (4, 4), (8, 8)}
    assert all(abs(row["value"]) < 9 for row in rows)
