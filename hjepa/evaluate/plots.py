"""Figures: data in, a matplotlib Axes out.

The position schemes and the strategies for other grids wear the palette of Okabe & Ito (2008) and one brown, and
nothing else does. Context, target, rows, levels and what has no name wear other hues
(three of Paul Tol's muted scheme and more), so that no line looks like a scheme that it is not.
Fonts, sizes and grids stand in `notebooks/matplotlibrc`. Every function draws on the Axes it is given, or on a
new one, and returns it; titles that state a finding are left to the caller.
Not covered: saving, captions, animation (a notebook calls a function once per frame).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke
from scipy.optimize import isotonic_regression
from torch import Tensor

from ..inputs import size_pair, size_text
from ..nn.frequencies import STRATEGIES
from ..nn.masks import Masks, level_grid
from .measures import symmetric_eigen
from .results import Row, by_encoder, by_setting, home_size, summarise

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, BROWN = "#E69F00", "#56B4E9", "#000000", "#8C564B"
INDIGO, OLIVE, WINE, LAVENDER = "#332288", "#999933", "#882255", "#9F8CFF"
ROSE, MOSS, VIOLET, MAGENTA = "#DD3366", "#4D6600", "#8822DD", "#BB3399"
CYCLE = (INDIGO, OLIVE, WINE, LAVENDER, ROSE, MOSS, VIOLET, MAGENTA)  # as axes.prop_cycle in matplotlibrc
INK = "#444444"  # reference lines and marks
_ORDERED = LinearSegmentedColormap.from_list("ordered", (LAVENDER, "#7744CC", "#3D0070"))
SIGNED = LinearSegmentedColormap.from_list("signed", ("#444400", OLIVE, "#FFFFFF", LAVENDER, INDIGO))


def shades(n: int) -> list[str]:
    """n colours of one hue, light to dark, for things that have an order: levels, layers, values of theta."""
    return [to_hex(_ORDERED(i / max(n - 1, 1))).upper() for i in range(n)]


COLORS = {
    "absolute": PURPLE, "rope": VERMILLION, "sincos": BLUE, "hybrid": SKY, "none": BLACK,
    "extrapolate": ORANGE, "interpolate": VERMILLION, "ntk": GREEN, "ntk_by_parts": BROWN,
    "context": INDIGO, "target": ROSE, "predicted": OLIVE, "row": WINE, "column": MOSS,
    **{f"level {level}": color for level, color in enumerate(shades(3))},
    "random": "#999999", "pixels": "#737373", "histogram": "#B3B3B3", "hog": "#4D4D4D", "chance": "#CCCCCC",
}  # fmt: skip
BASELINES = ("random", "pixels", "histogram", "hog", "chance")  # drawn grey and dashed
STYLES = {"extrapolate": ("-.", "s")}  # line and marker of an orange beside another
MANY_LINES = 8  # as many as a panel can hold
METRICS = {
    "probe": "linear probe accuracy\n(fitted at the training size)",
    "probe_fixed": "linear probe accuracy\n(weak fixed penalty, training size)",
    "probe_few": "linear probe accuracy\n(few labels, training size)",
    "probe_centred": "linear probe accuracy\n(training size, centred at each)",
    "probe_refit": "linear probe accuracy\n(refitted at each size)",
    "knn": "kNN accuracy\n(gallery at the training size)",
    "knn_centred": "kNN accuracy\n(training size, centred at each)",
    "retrieval": "same picture found at\nthe training size (fraction)",
    "match_0": "patches that find their own place\nin the picture at the training size",
    "match_1": "patches that find their place\nwithin one patch",
    "match_2": "patches that find their place\nwithin two patches",
    "place": "(row, column) read from a patch, $R^2$\n(fitted at the training size)",
    "effective_rank": "effective rank of the features",
    "feature_std": "spread of the normalised features",
    "cka": "CKA with the features\nat the training size",
}


def _key(name: str) -> str | None:
    """The name of COLORS inside a label, a strategy's before all, then the longest: "rope ntk" -> "ntk"."""
    words = re.sub("[-_]", " ", name.lower())
    found = [key for key in COLORS if re.search(rf"\b{key.replace('_', ' ')}", words)]
    return max(found, key=lambda key: (key in STRATEGIES, len(key)), default=None)


def line_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each label: that of the thing it names, else, or if an earlier label has it, a free one.

    A free one is never that of a scheme or strategy, nor of a thing that another label names.
    """
    wanted = {name: COLORS.get(_key(name) or "") for name in names}
    given: dict[str, str] = {}
    for name, color in wanted.items():
        free = [c for c in CYCLE if c not in (*given.values(), *wanted.values())] or list(CYCLE)
        given[name] = color if color and color not in given.values() else free[0]
    return given


def picture(image: Tensor, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """Image [3, h, w], normalised by mean and std (or uint8) -> array [h, w, 3] in 0..1 for imshow."""
    if image.dtype == torch.uint8:
        image = image / 255
    shape = (3, 1, 1)
    undone = image.detach().cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return undone.clamp(0, 1).permute(1, 2, 0).numpy()


# ---- curves


def transfer_figure(
    rows: Sequence[Row], metric: str, train_size: Any, *, ax: Axes | None = None, labels: bool = True
) -> Axes:
    """One line per encoder over image size, its interval shaded, the training size marked, lines labelled at the right.

    rows as `resolution_transfer` or `summarise` of `hjepa.evaluate` give them, one per encoder and size.
    Random init and raw pixels are grey and dashed. A non-square size stands at the square root of its area.
    """
    ax = ax or plt.subplots()[1]
    found = by_encoder(rows, metric)
    colors = line_colors(list(found))
    ticks: dict[float, str] = {}
    for name, cells in found.items():
        x = [float(np.sqrt(h * w)) for h, w in cells]
        ticks.update(zip(x, map(size_text, cells), strict=True))
        value, low, high = ([row[key] for row in cells.values()] for key in ("value", "low", "high"))
        simple, line, marker = _key(name) in BASELINES, *STYLES.get(_key(name) or "", ("-", "o"))
        drawn: dict[str, Any] = {"ls": "--"} if simple else {"ls": line, "marker": marker}
        ax.plot(x, value, color=colors[name], label=name, **drawn)
        ax.fill_between(x, low, high, color=colors[name], alpha=0.07 if simple else 0.15, linewidth=0)
    home = size_pair(train_size)
    ax.axvline(float(np.sqrt(home[0] * home[1])), color=INK, lw=1, ls=":", label="_training size")
    ax.annotate("trained here", (float(np.sqrt(home[0] * home[1])), 1), xycoords=("data", "axes fraction"),
                xytext=(3, -2), textcoords="offset points", va="top", fontsize="small", color=INK)  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ticks), [ticks[x] for x in sorted(ticks)])
    ax.minorticks_off()
    ax.set(xlabel="image size (pixels, log scale)", ylabel=METRICS.get(metric, metric))
    if labels:
        label_lines(ax)
    return ax


def sweep_figure(rows: Sequence[Row], metric: str = "probe", *, columns: int = 2) -> Figure:
    """One `transfer_figure` per `setting` of a sweep's rows, with 95 % t intervals over its seeds.

    rows as `results.sweep_rows` gives them. Where more than MANY_LINES encoders were read, the NTK readings are left
    to the table. ValueError if a setting has no row of the metric.
    """
    many = len({row["encoder"] for row in rows}) > MANY_LINES
    groups = by_setting([row for row in rows if not (many and "ntk" in row["encoder"])])
    height = -(-len(groups) // columns)
    size = (4.6 * columns, 3 * height)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(groups) :]:
        ax.remove()
    for ax, (setting, members) in zip(axes.flat, groups.items(), strict=False):
        transfer_figure(summarise(members), metric, home_size(members), ax=ax)
        ax.set_title(setting, fontsize="medium")
    return figure


def cells_figure(
    rows: Sequence[Row],
    train_size: Any,
    metrics: Sequence[str] = ("knn", "probe"),
    *,
    columns: int | None = None,
    trained: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """Small multiples: a panel for each metric and `cell` of the rows, means with 95 % t intervals over seeds.

    Random init and the simple baselines, which know nothing of cells, are those of the first cell in every panel; what
    has a single seed keeps its interval over pictures. `columns`: panels side by side (all cells). `trained`: by cell,
    further sizes in pixels that training drew, as dotted lines.
    """
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    columns = columns or len(cells)
    lines = -(-len(cells) // columns)  # of panels, for each metric
    made, axes = plt.subplots(len(metrics) * lines, columns, sharey="row", squeeze=False, layout="constrained",
                              figsize=(3.25 * columns, 3 * len(metrics) * lines))  # fmt: skip
    for ax in axes.flat:
        ax.axis("off")
    for metric, block in zip(metrics, np.split(axes, len(metrics)), strict=True):
        for ax in block[1:, 0]:
            ax.sharey(block[0, 0])
        for cell, ax in zip(cells, block.flat, strict=False):
            ax.axis("on")
            own = [row for row in rows if row["cell"] == (cells[0] if _key(row["encoder"]) in BASELINES else cell)]
            shown = summarise([{key: value for key, value in row.items() if key != "cell"} for row in own])
            transfer_figure(shown, metric, train_size, ax=ax, labels=False)
            for size in (trained or {}).get(cell, ()):
                ax.axvline(size, ymax=0.92, color=INK, lw=1, ls=":", label="_trained too")  # below the label
            ax.set_ylabel(METRICS.get(metric, metric).split("\n")[0] if ax in block[:, 0] else "")
            ax.set_xlabel(ax.get_xlabel() if ax in axes[-1] else "")
            if metric == metrics[0] or lines > 1:
                ax.set_title(cell)
        for last in {len(cells), *range(columns, len(cells), columns)}:  # once all limits stand
            label_lines(block.flat[last - 1])
    return made


def training_curves(
    logs: Mapping[str, Sequence[Row]],
    field: str = "loss",
    *,
    baselines: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One line per run over the training step; rows as in log.jsonl, those without the field are left out.

    baselines: horizontal dashed grey lines, such as the kNN accuracy of raw pixels. ValueError if no run has the
    field.
    """
    ax = ax or plt.subplots()[1]
    colors = line_colors([*logs])
    for name, log in logs.items():
        points = [(row["step"], row[field]) for row in log if row.get(field) is not None]
        if not points:
            known = ", ".join(dict.fromkeys(key for row in log for key in row))
            raise ValueError(f"the log of {name!r} has no {field!r}; it has: {known}")
        ax.plot(*zip(*points, strict=True), color=colors[name], label=name)
    for name, value in (baselines or {}).items():
        ax.axhline(value, color=COLORS.get(_key(name) or "", COLORS["random"]), ls="--", lw=1.2, label=name)
    ax.set(xlabel="training step", ylabel=field.replace("_", " "))
    label_lines(ax)
    return ax


def label_lines(ax: Axes) -> None:
    """Write each line's label right of the axes at the height of its end, moved apart where they would overlap."""
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [float(np.asarray(line.get_ydata(), dtype=float)[-1]) for line in lines]
    low, high = ax.get_ylim()
    figure = ax.get_figure(root=True)
    points = ax.get_position().height * (figure.get_figheight() if figure else 3.4) * 72  # height of the axes
    line_height = 1.35 * plt.rcParams["font.size"] * (high - low) / points
    order = np.argsort(ends, kind="stable")
    steps = line_height * np.arange(len(ends))
    places = isotonic_regression(np.array(ends)[order] - steps).x + steps if ends else []
    for i, place in zip(order, places, strict=True):
        ax.text(1.02, place, str(lines[i].get_label()), color=lines[i].get_color(), va="center",
                transform=ax.get_yaxis_transform())  # fmt: skip


# ---- grids


def score_map(scores: Tensor, query: Any, grid_size: tuple[int, int], *, ax: Axes | None = None) -> Axes:
    """Scores of one query against every patch, as a picture of the grid; the query's cell is framed.

    scores [H*W] or [H, W]; query: (row, column) or a row-major index. Scores of both signs get a two-sided
    colour scale, olive below zero, white at zero and indigo above.
    """
    ax = ax or plt.subplots(figsize=(3, 3))[1]
    values = scores.detach().cpu().float().reshape(grid_size).numpy()
    row, column = divmod(query, grid_size[1]) if isinstance(query, int) else query
    if not (0 <= row < grid_size[0] and 0 <= column < grid_size[1]):
        raise ValueError(f"query {query} is outside the {grid_size[0]}x{grid_size[1]} grid")
    reach = float(np.abs(values).max())
    if values.min() < 0 < values.max():
        ax.imshow(values, cmap=SIGNED, vmin=-reach, vmax=reach)
    else:
        ax.imshow(values)
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="white", lw=1.6)
    frame.set_path_effects([withStroke(linewidth=3.6, foreground="#000000")])  # seen on light and on dark cells
    ax.add_patch(frame)
    ax.set(xlabel="patch column", ylabel="patch row")
    ax.locator_params(integer=True)
    ax.grid(False)
    return ax


def show_masks(
    image: Tensor, masks: Masks, sample: int, grid_size: tuple[int, int], patch_size: int, *, level: int = 0,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """One picture under its masks: context patches indigo, target cells of a level rose, the rest faded.

    image [3, h, w] in 0..1 (see `picture`). Each target cell is outlined and its centre marked: the position, in
    patches and often fractional, at which the predictor is asked.
    """
    ax = ax or plt.subplots(figsize=(3, 3))[1]
    height, width = grid_size
    tint = np.full((height, width, 4), 1.0)
    tint[..., 3] = 0.75  # white: neither seen nor asked for
    context = masks.context_idx[sample].cpu().numpy()
    tint.reshape(-1, 4)[context] = (*to_rgb(COLORS["context"]), 0.3)
    columns, step = level_grid(grid_size, level)[1], 2**level
    centres = []
    for cell in masks.target_idx[level][sample].tolist():
        top, left = cell // columns * step, cell % columns * step
        bottom, right = min(top + step, height), min(left + step, width)
        tint[top:bottom, left:right] = (*to_rgb(COLORS["target"]), 0.45)
        box = (left * patch_size, top * patch_size), (right - left) * patch_size, (bottom - top) * patch_size
        ax.add_patch(Rectangle(*box, fill=False, ec=COLORS["target"], lw=1.2))
        centres.append(((left + right) / 2 * patch_size, (top + bottom) / 2 * patch_size))
    x, y = zip(*centres, strict=True)
    extent = (0, width * patch_size, height * patch_size, 0)
    ax.imshow(picture(image), extent=extent)
    ax.imshow(tint, extent=extent)
    ax.scatter(x, y, s=12, color=COLORS["target"], edgecolor="white", linewidth=0.6, zorder=3)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=True, color="#bbbbbb")  # or faded patches at the border of a white picture are lost
    return ax


def pca_features(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """Feature maps [H, W, D], sizes may differ -> pictures [H, W, 3] in 0..1, comparable with each other.

    The first three principal components, shared by all maps (each map weighs the same, whatever its size), as
    red, green and blue; the range holds all but 1 % of each map at both ends. Signs are chosen so that the
    largest weight of each component is positive.
    """
    flat = [m.detach().cpu().double().flatten(0, 1) for m in maps]
    mean = torch.stack([x.mean(dim=0) for x in flat]).mean(dim=0)
    spread = torch.stack([(x - mean).T @ (x - mean) / len(x) for x in flat]).mean(dim=0)
    axes = symmetric_eigen(spread)[1][:, -3:].flip(1)  # [D, 3], strongest first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    scores = [(x - mean) @ axes for x in flat]
    ends = torch.stack([s.quantile(torch.tensor([0.01, 0.99]).double(), dim=0) for s in scores])  # [maps, 2, 3]
    low, high = ends[:, 0].min(dim=0).values, ends[:, 1].max(dim=0).values
    return [
        ((s - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).view(*m.shape[:2], 3).numpy()
        for s, m in zip(scores, maps, strict=True)
    ]


def rotation_pairs(
    pairs: Tensor, angles: Tensor, *, colors: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Channel pairs [P, 2] as arrows on P circles: grey before, coloured after rotation by angles [P] (radians).

    Every pair is drawn at unit length, since rotation keeps its length; x is the first channel of a pair.
    """
    count = len(angles)
    ax = ax or plt.subplots(figsize=(1.1 * count, 1.5))[1]
    start = np.arctan2(*pairs.detach().cpu().double().numpy()[:, ::-1].T)
    turn = np.linspace(0, 2 * np.pi, 100)
    for p, (before, angle) in enumerate(zip(start, angles.detach().cpu().double().numpy(), strict=True)):
        middle, color = 2.4 * p, (colors or CYCLE)[p % len(colors or CYCLE)]
        ax.plot(middle + np.cos(turn), np.sin(turn), color="#cccccc", lw=0.8, label="_circle")
        for name, direction, shade in (("before", before, "#999999"), ("after", before + angle, color)):
            tip = middle + np.cos(direction), np.sin(direction)
            ax.plot([middle, tip[0]], [0, tip[1]], color=shade, marker="o", markevery=[1], label=f"_{name} {p}")
        ax.text(middle, -1.15, f"{angle:.2f} rad", ha="center", va="top", fontsize="small")
    ax.set(aspect="equal", xlim=(-1.2, 2.4 * (count - 1) + 1.2), ylim=(-1.6, 1.15))
    ax.set_axis_off()
    return ax


def token_pairs(
    place: tuple[float, float], angles: Tensor, grid_size: tuple[int, int], *, axes: Sequence[Axes]
) -> Sequence[Axes]:
    """A token at `place` (row, column) on the grid, and beside it the angles [2, P] of its row and column pairs.

    Row things are wine red and column things moss green. Both axes are cleared first, so that a call draws one frame.
    """
    (row, column), (grid, circles) = place, axes
    for ax in axes:
        ax.clear()
    grid.set(xlim=(-0.5, grid_size[1] - 0.5), ylim=(grid_size[0] - 0.5, -0.5), aspect="equal")
    grid.set(xticks=np.arange(grid_size[1] + 1) - 0.5, yticks=np.arange(grid_size[0] + 1) - 0.5)
    grid.set(xlabel="column", ylabel="row")
    grid.tick_params(length=0, labelbottom=False, labelleft=False)
    grid.plot([column, column], [-0.5, row], color=COLORS["row"], lw=1.2)
    grid.plot([-0.5, column], [row, row], color=COLORS["column"], lw=1.2)
    grid.plot(column, row, "o", color="#222222", markersize=8)
    for line, (name, turned) in enumerate(zip(("row", "column"), angles.tolist(), strict=True)):
        for pair, angle in enumerate(turned):
            x, y = 2.4 * pair, -2.9 * line
            circles.add_patch(Circle((x, y), 1, fill=False, ec="#cccccc"))
            tip = x + np.cos(angle), y + np.sin(angle)
            circles.plot([x, tip[0]], [y, tip[1]], color=COLORS[name], marker="o", markevery=[1])
            circles.text(x, y - 1.2, f"{angle:.2f} rad", ha="center", va="top", fontsize="small")
        circles.text(-1.4, -2.9 * line, f"{name}\npairs", ha="right", va="center", color=COLORS[name])
    circles.set(aspect="equal", xlim=(-3.0, 2.4 * angles.shape[1] - 1.2), ylim=(-4.7, 1.3))
    circles.set_axis_off()
    return axes
