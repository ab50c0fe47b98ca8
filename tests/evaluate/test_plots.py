"""Figures, checked by the data in the Axes they return."""

import json
import re
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from hjepa.evaluate.plots import (
    BASELINES,
    COLORS,
    CYCLE,
    INK,
    MANY_LINES,
    SIGNED,
    line_colors,
    pca_features,
    picture,
    rotation_pairs,
    score_map,
    shades,
    show_masks,
    token_pairs,
    training_curves,
    transfer_figure,
)
from hjepa.experiments.transfer import SCHEMES
from hjepa.nn.frequencies import STRATEGIES
from hjepa.nn.masks import Masks

STYLE = Path(__file__).parents[2] / "notebooks" / "matplotlibrc"
RESERVED = {COLORS[key] for key in (*SCHEMES, *STRATEGIES) if key in COLORS}
# Linear RGB as readers without red or green cones see it (Machado et al. 2009, table 1, severity 1.0)
SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


@pytest.fixture(autouse=True)
def house_style():
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    with plt.rc_context(fname=STYLE):
        yield
    plt.close("all")
    plt.switch_backend(backend)


def _rows(values, sizes=(32, 64, 128)):
    return [
        {
            "encoder": name,
            "size": size,
            "metric": "probe",
            "value": value,
            "low": value - 0.05,
            "high": value + 0.1,
            "n": 3,
        }
        for name, line in values.items()
        for size, value in zip(sizes, line, strict=True)
    ]


def _lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_transfer_figure_draws_the_rows_in_order_of_size():
    rows = _rows({"rope": [0.5, 0.7, 0.6], "absolute": [0.3, 0.6, 0.4]})
    lines = _lines(transfer_figure(rows[::-1], "probe", 64))
    assert lines["rope"].get_xdata() == pytest.approx([32, 64, 128])
    assert lines["rope"].get_ydata() == pytest.approx([0.5, 0.7, 0.6])
    assert lines["absolute"].get_ydata() == pytest.approx([0.3, 0.6, 0.4])
    assert lines["_training size"].get_xdata() == pytest.approx([64, 64])


def test_transfer_figure_shades_each_interval_in_the_colour_of_its_line():
    ax = transfer_figure(_rows({"rope": [0.5, 0.7, 0.6]}), "probe", 64)
    (shade,) = ax.collections
    corners = shade.get_paths()[0].vertices
    at_64 = corners[np.isclose(corners[:, 0], 64), 1]
    assert (at_64.min(), at_64.max()) == pytest.approx((0.65, 0.8))
    assert matplotlib.colors.to_hex(shade.get_facecolor()[0]).upper() == COLORS["rope"]


def test_baselines_are_grey_and_dashed_and_encoders_are_not():
    names = ["rope", "random init", "raw pixels", "colour histogram", "HOG"]
    lines = _lines(transfer_figure(_rows(dict.fromkeys(names, [0.5] * 3)), "probe", 64))
    for name, line in lines.items():
        if name == "_training size":
            continue
        r, g, b = matplotlib.colors.to_rgb(line.get_color())
        assert (r == g == b) is (line.get_linestyle() == "--") is (name != "rope")
    assert BASELINES == ("random", "pixels", "histogram", "hog", "chance")
    assert len({line.get_color() for line in lines.values()}) == len(names) + 1


def test_non_square_sizes_stand_at_the_square_root_of_their_area_and_are_named():
    ax = transfer_figure(_rows({"rope": [0.5, 0.7, 0.6]}, sizes=[(32, 32), (32, 128), (96, 96)]), "probe", 32)
    assert _lines(ax)["rope"].get_xdata() == pytest.approx([32, 64, 96])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["32", "32x128", "96"]


def test_line_labels_never_overlap_and_keep_the_order_of_the_lines():
    names = {f"run {i}": [0.5, 0.5, 0.5 + i / 1000] for i in range(6)} | {"rope": [0.1, 0.2, 0.1]}
    ax = transfer_figure(_rows(names), "probe", 64)
    ax.figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text() in names}
    assert set(boxes) == set(names)
    order = sorted(boxes, key=lambda name: boxes[name].y0)
    assert order == ["rope", *(f"run {i}" for i in range(6))]
    for lower, upper in pairwise(order):
        assert boxes[lower].y1 <= boxes[upper].y0
    end = ax.transData.transform((128, 0.1))[1]
    assert boxes["rope"].y0 < end < boxes["rope"].y1  # a label with room stays at its line


def test_transfer_figure_refuses_rows_of_several_seeds():
    with pytest.raises(ValueError, match="summarise"):
        transfer_figure(_rows({"rope": [0.5, 0.7, 0.6]}) * 2, "probe", 64)


def test_labels_get_the_colour_of_what_they_name():
    names = ["RoPE", "absolute, resampled", "RoPE interpolated", "NTK-by-parts", "hybrid", "Random init", "raw_pixels",
             "openmoji-rope ntk", "chance"]  # fmt: skip
    keys = ["rope", "absolute", "interpolate", "ntk_by_parts", "hybrid", "random", "pixels", "ntk", "chance"]
    assert [line_colors([name])[name] for name in names] == [COLORS[key] for key in keys]
    assert line_colors(["unrandomised"])["unrandomised"] == CYCLE[0]  # a word counts from its start


def test_two_labels_never_share_a_colour():
    given = line_colors(["rope theta 10", "rope theta 100", "rope theta 1000", "other", "absolute"])
    assert given["rope theta 10"] == COLORS["rope"]
    assert len(set(given.values())) == 5
    assert len(set(line_colors([f"run {i}" for i in range(MANY_LINES)]).values())) == MANY_LINES


def test_a_free_colour_is_that_of_no_scheme_and_of_no_other_label():
    given = line_colors(["one run", "another", "third", "rope", "rope again", "context", "predicted"])
    assert given["rope"] == COLORS["rope"] and given["context"] == COLORS["context"]
    assert given["predicted"] == COLORS["predicted"] and len(set(given.values())) == len(given)
    assert RESERVED & set(given.values()) == {COLORS["rope"]}


def _lab(color, sight="all cones"):
    """CIE Lab of a colour as a reader of that sight sees it."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(SIGHTS[sight]) @ linear, 0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)[None, None])[0, 0]


def _apart(one, other, sight="all cones"):
    return float(np.linalg.norm(_lab(one, sight) - _lab(other, sight)))


def test_no_colour_is_near_that_of_a_scheme_or_strategy():
    """By 25 in CIE Lab, ten times what the eye just tells apart. Two schemes differ by 26 at least."""
    named = {key: color for key, color in COLORS.items() if key not in (*SCHEMES, *STRATEGIES)}
    others = {**named, "ink": INK, **{f"cycle {i}": color for i, color in enumerate(CYCLE)}}
    others |= {f"shade {i} of {n}": color for n in range(2, 6) for i, color in enumerate(shades(n))}
    others |= {f"signed {x:.1f}": SIGNED(x) for x in np.linspace(0, 1, 11)}
    near = {(key, scheme) for key, color in others.items() for scheme in RESERVED if _apart(color, scheme) < 25}
    assert len(RESERVED) == 8 and len(named) == 13 and near == set()


def test_notebooks_take_the_colours_of_schemes_by_name_only():
    """So none is drawn for something else by its code, by its number in matplotlib's cycle or in a colour map."""
    by_hand = re.compile("|".join([*RESERVED, r"[\"']C\d[\"']", "tab:", "PuOr"]), re.IGNORECASE)
    files = [*STYLE.parent.glob("*.ipynb"), *STYLE.parent.glob("solutions/*.ipynb")]
    cells = {(f.name, i): c for f in files for i, c in enumerate(json.loads(f.read_text(encoding="utf-8"))["cells"])}
    drawn = {place: "".join(cell["source"]) for place, cell in cells.items() if cell["cell_type"] == "code"}
    assert len(files) > 20 and [place for place, code in drawn.items() if by_hand.search(code)] == []


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_of_one_figure_stay_apart_for_colour_blind_readers(sight):
    """As far as the two nearest of the schemes: 17.9 in CIE Lab, ntk and absolute without green cones."""
    groups = ["context", "target", "predicted"], ["row", "column"], ["level 0", "level 1", "level 2"]
    together = [[COLORS[key] for key in group] for group in groups] + [list(CYCLE)]
    assert min(_apart(a, b, sight) for group in together for a, b in combinations(group, 2)) > 17.9


def test_lines_stand_out_from_white():
    """A contrast of 2.6 at least (WCAG 2.2), more than two of the schemes' colours have."""
    lines = [*CYCLE, *shades(5), *(color for key, color in COLORS.items() if key not in BASELINES)]
    luminance = {c: ((_lab(c)[0] + 16) / 116) ** 3 for c in lines if c not in RESERVED}  # L to Y, above 0.009
    assert min(1.05 / (y + 0.05) for y in luminance.values()) > 2.6


def test_cycle_of_the_style_file_is_the_palette():
    assert tuple(plt.rcParams["axes.prop_cycle"].by_key()["color"]) == CYCLE


def test_figures_have_a_white_background():
    assert (
        matplotlib.colors.to_hex(transfer_figure(_rows({"rope": [1, 1, 1]}), "probe", 64).get_facecolor()) == "#ffffff"
    )
    assert plt.rcParams["savefig.facecolor"] == plt.rcParams["figure.facecolor"] == "white"


def test_training_curves_leave_out_rows_without_the_field_and_draw_baselines():
    log = [
        {"step": 0, "knn": 0.2},
        {"step": 5, "loss": 0.9},
        {"step": 10, "loss": None},
        {"step": 20, "loss": 0.4, "knn": 0.5},
    ]
    lines = _lines(training_curves({"rope": log}, baselines={"raw pixels": 0.6}))
    assert list(lines["rope"].get_xdata()) == [5, 20] and list(lines["rope"].get_ydata()) == [0.9, 0.4]
    assert list(lines["raw pixels"].get_ydata()) == [0.6, 0.6] and lines["raw pixels"].get_linestyle() == "--"
    assert list(_lines(training_curves({"rope": log}, "knn"))["rope"].get_ydata()) == [0.2, 0.5]


def test_training_curves_of_an_unknown_field_name_the_known_ones():
    with pytest.raises(ValueError, match="no 'los'; it has: step, loss"):
        training_curves({"rope": [{"step": 1, "loss": 0.5}]}, "los")


def test_score_map_shows_rows_downwards_and_frames_the_query():
    scores = torch.arange(6.0)
    for query in [(1, 2), 5]:
        ax = score_map(scores, query, (2, 3))
        assert ax.images[0].get_array().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
        (frame,) = ax.patches
        assert frame.get_xy() == (1.5, 0.5)  # column 2, row 1


def test_score_map_of_both_signs_has_its_middle_colour_at_zero():
    image = score_map(torch.tensor([-1.0, 0, 3, 0]), 0, (2, 2)).images[0]
    assert image.get_clim() == (-3, 3)
    assert score_map(torch.tensor([1.0, 2, 3, 4]), 0, (2, 2)).images[0].get_clim() == (1, 4)


def test_score_map_refuses_a_query_outside_the_grid():
    with pytest.raises(ValueError, match="2x3 grid"):
        score_map(torch.zeros(6), (2, 0), (2, 3))


@pytest.fixture
def masks():
    """Sample 1 of a 4x6 patch grid: context patches 0 and 7; targets 23 at level 0, cell (1, 2) at level 1."""
    return Masks(torch.tensor([[1, 2], [0, 7]]), (torch.tensor([[3], [23]]), torch.tensor([[1], [5]])))


def _tint(ax):
    tint = np.asarray(ax.images[1].get_array())
    same = {
        name: np.isclose(tint[..., :3], matplotlib.colors.to_rgb(COLORS[name])).all(-1)
        for name in ("context", "target")
    }
    return same["context"], same["target"]


@pytest.mark.parametrize(
    ("level", "cells", "centre"), [(0, [(3, 5)], (44, 28)), (1, [(2, 4), (2, 5), (3, 4), (3, 5)], (40, 24))]
)
def test_show_masks_paints_context_and_target_cells_of_the_level(masks, level, cells, centre):
    ax = show_masks(torch.zeros(3, 32, 48), masks, 1, (4, 6), 8, level=level)
    context, target = _tint(ax)
    assert [tuple(cell) for cell in np.argwhere(context)] == [(0, 0), (1, 1)]
    assert [tuple(cell) for cell in np.argwhere(target)] == cells
    assert ax.images[1].get_extent() == [0, 48, 32, 0]
    assert ax.collections[0].get_offsets().tolist() == [list(centre)]  # x, y in pixels


def test_coarse_cell_cut_by_the_edge_has_its_centre_inside_the_grid():
    """On 3x3 patches the last level-1 cell is one patch, (2, 2)."""
    ax = show_masks(
        torch.zeros(3, 12, 12),
        Masks(torch.tensor([[0]]), (torch.tensor([[1]]), torch.tensor([[3]]))),
        0,
        (3, 3),
        4,
        level=1,
    )
    assert np.argwhere(_tint(ax)[1]).tolist() == [[2, 2]]
    assert ax.collections[0].get_offsets().tolist() == [[10, 10]]


def test_picture_undoes_normalisation():
    pixels = torch.rand(3, 4, 5)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert picture(normalised, mean, std) == pytest.approx(pixels.permute(1, 2, 0).numpy(), abs=1e-6)
    assert picture(torch.full((3, 1, 1), 255, dtype=torch.uint8)).tolist() == [[[1, 1, 1]]]


def test_pca_colours_are_the_same_for_the_same_feature_in_every_map():
    """Two planted kinds of patch, at three grid sizes: left half one kind, right half the other."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 16, generator=g)
    maps = [kinds[(torch.arange(w) >= w // 2).long()].expand(h, w, 16) for h, w in [(2, 4), (4, 4), (6, 8)]]
    pictures = pca_features([m + 0.01 * torch.randn(m.shape, generator=g) for m in maps])
    assert [p.shape for p in pictures] == [(2, 4, 3), (4, 4, 3), (6, 8, 3)]
    for p in pictures:
        left, right = p[:, : p.shape[1] // 2, 0], p[:, p.shape[1] // 2 :, 0]
        assert abs(left.mean() - pictures[0][0, 0, 0]) < 0.1
        assert abs(left.mean() - right.mean()) > 0.8  # first component, first colour


def test_pca_pictures_do_not_change_with_the_number_of_patches_of_one_map():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 3, 8, generator=g), torch.randn(4, 4, 8, generator=g)
    one = pca_features([a, b])[0]
    repeated = pca_features([a, b.repeat_interleave(3, 0).repeat_interleave(3, 1)])[0]
    assert np.corrcoef(one.ravel(), repeated.ravel())[0, 1] > 0.99


def test_rotation_pairs_turns_each_arrow_counterclockwise_by_its_angle():
    pairs, angles = torch.tensor([[2.0, 0.0], [0.0, -3.0]]), torch.tensor([torch.pi / 2, 0.3])
    lines = _lines(rotation_pairs(pairs, angles))
    tip = {
        name: complex(*(float(line.get_data()[k][1]) for k in (0, 1)))
        for name, line in lines.items()
        if name != "_circle"
    }
    assert tip["_before 0"] == pytest.approx(1) and tip["_after 0"] == pytest.approx(1j)
    assert tip["_before 1"] - 2.4 == pytest.approx(-1j)
    assert (tip["_after 1"] - 2.4) / (tip["_before 1"] - 2.4) == pytest.approx(np.exp(0.3j))


def test_token_pairs_marks_the_token_and_turns_row_and_column_arrows_by_their_own_angles():
    axes = plt.subplots(1, 2)[1]
    token_pairs((0, 0), torch.zeros(2, 3), (8, 8), axes=axes)
    token_pairs((2, 5), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]), (8, 8), axes=axes)
    token = [line for line in axes[0].get_lines() if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in token] == [[[5.0, 2.0]]]  # x is the column, and no older frame
    arrows = [line for line in axes[1].get_lines() if line.get_marker() == "o"]
    tips = np.stack([np.diff(line.get_xydata(), axis=0)[0] for line in arrows])
    np.testing.assert_allclose(tips, np.stack([np.cos(np.arange(6)), np.sin(np.arange(6))], axis=1), atol=1e-9)
    assert [line.get_color() for line in arrows] == [COLORS["row"]] * 3 + [COLORS["column"]] * 3
