"""What people hand in, understood or refused by name: names, image sizes, multiples of a patch.

Every refusal is a UserError of one line that names the value, what is allowed, and the nearest right thing.
Not covered: tensors (`hjepa.nn.checks`) and whole configs (`hjepa.config`).
"""

import difflib
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake of the user, said in one line; the command line shows no traceback of it."""


@contextmanager
def users_own() -> Iterator[None]:
    """Inside, a ValueError is the user's mistake: layers refuse values that come from a config."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name most like `name`, by the whole or by its last dotted part; "" when none is near."""
    name, names = str(name), list(known)
    whole = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = {key.rsplit(".", 1)[-1]: key for key in reversed(names)}
    part = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)
    return last[part[0]] if part else ""


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the allowed names."""
    if value not in allowed:
        near = nearest(value, allowed) or "none"
        raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}; nearest: {near}")


def size_pair(size: Any, name: str = "image size", *, text: bool = True) -> tuple[int, int]:
    """A size as (height, width): 64, (64, 96), [64, 96] and, unless text=False, "64" and "64x96" are understood.

    Raises:
        ValueError: anything else, numbers below 1 too; `name` says in the message what was given.
    """
    try:
        worded = isinstance(size, str) and text
        many = isinstance(size, Iterable) and not isinstance(size, str | bytes)
        parts = size.split("x") if worded else list(size) if many else [size, size]
        whole = [int(part) if worded else operator.index(part) for part in parts if not isinstance(part, bool)]
        height, width = (whole[0], whole[-1]) if len(whole) == len(parts) in ((1, 2) if worded else (2,)) else (0, 0)
    except (ValueError, TypeError):
        height = width = 0
    if min(height, width) < 1:
        raise UserError(f"{name} {size!r} is not understood; give a positive whole number or (height, width)")
    return height, width


def size_text(size: Any) -> str:
    """ "64" for a square, "64x96" for height 64 and width 96."""
    height, width = size_pair(size)
    return f"{height}" if height == width else f"{height}x{width}"


def patch_grid(size: Any, patch_size: Any) -> tuple[int, int]:
    """Patch grid (H, W) of an image size in pixels. ValueError where a side is not a multiple of the patch."""
    return whole_patches(size_pair(size), size_pair(patch_size, "patch_size"))


def whole_patches(pixels: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """As `patch_grid`, of pairs known to be pairs: plain arithmetic, which a compiler can follow for any size."""
    for side, step in zip(pixels, patch, strict=True):
        if side % step or side < step:
            near = max(step, (2 * side + step) // (2 * step) * step)
            shown = f"image size {pixels[0]}x{pixels[1]}"
            raise UserError(f"{shown} is not a multiple of the patch {step}; nearest: {near}")
    return pixels[0] // patch[0], pixels[1] // patch[1]
