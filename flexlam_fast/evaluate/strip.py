"""The film strip: what was seen, what came next, and what each budget's codes decode to."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.data.extras import need
from flexlam_fast.evaluate.decoding import Pairs
from flexlam_fast.evaluate.fidelity import psnr
from flexlam_fast.evaluate.files import write

#: Tiles are the frames enlarged by a whole number to at least this many pixels.
TILE = 128
GAP, LABEL, HEAD, CAPTION, MARGIN = 10, 128, 58, 22, 18
PAPER, INK, MUTED, RULE = (255, 255, 255), (24, 28, 36), (110, 118, 130), (214, 219, 226)


class StripRow(NamedTuple):
    """One transition: ``label``, ``tiles`` (o_t, o_{t+1}, one per budget; uint8 ``[H,W,3]``), a caption for each."""

    label: str
    tiles: tuple[NDArray[np.uint8], ...]
    captions: tuple[str, ...]


def pick(moves: NDArray[np.float32], count: int) -> list[int]:
    """Positions of ``count`` transitions that change much, from the 95th percentile of ``moves`` downward.

    The very largest changes are left out: those are cuts, flashes and hits, not movement.
    """
    order = np.argsort(-moves, kind="stable")
    places = [min(len(order) - 1, len(order) * (5 + 12 * i) // 100) for i in range(count)]
    return [int(order[place]) for place in dict.fromkeys(places)]


def strip_rows(labels: Sequence[str], pairs: Pairs, decoded: Sequence[Tensor]) -> list[StripRow]:
    """Lay out transitions and what was decoded of them, with the PSNR against ``o_{t+1}`` under each tile."""
    columns = [pairs.now, *decoded]
    quality = [psnr(column, pairs.following).tolist() for column in columns]
    rows = []
    for i, label in enumerate(labels):
        tiles = (pairs.now[i], pairs.following[i], *(column[i] for column in decoded))
        words = [f"{column[i]:.1f} dB" for column in quality]
        rows.append(StripRow(label, tuple(tile.numpy() for tile in tiles), (f"copy: {words[0]}", "truth", *words[1:])))
    return rows


def draw_strip(rows: Sequence[StripRow], budgets: Sequence[int]) -> Any:
    """Draw the strip as a PIL image.

    Args:
        rows: the transitions.
        budgets: of the decoded tiles, in their order.

    Raises:
        DataError: if Pillow is not installed.
    """
    image_module, draw_module = need("PIL.Image"), need("PIL.ImageDraw")
    height, width = rows[0].tiles[0].shape[:2]
    zoom = math.ceil(TILE / min(height, width))
    wide, tall = width * zoom, height * zoom
    columns = len(budgets) + 2
    size = (
        2 * MARGIN + LABEL + columns * (wide + GAP) + GAP,
        2 * MARGIN + HEAD + len(rows) * (tall + CAPTION + GAP) - GAP,
    )
    image = image_module.new("RGB", size, PAPER)
    pen = draw_module.Draw(image)
    lefts = [MARGIN + LABEL + i * (wide + GAP) + (GAP if i > 1 else 0) for i in range(columns)]
    _head(pen, lefts, wide, budgets)
    for number, row in enumerate(rows):
        top = MARGIN + HEAD + number * (tall + CAPTION + GAP)
        words = fit_label(row.label, tall // 20)
        pen.multiline_text((MARGIN, top + tall / 2), words, INK, font=_font(15), anchor="lm", spacing=5)
        for left, tile, caption in zip(lefts, row.tiles, row.captions, strict=True):
            picture = image_module.fromarray(np.ascontiguousarray(tile))
            image.paste(picture.resize((wide, tall), image_module.Resampling.NEAREST), (left, top))
            pen.text((left + wide / 2, top + tall + 4), caption, MUTED, font=_font(13), anchor="ma")
    return image


def fit_label(label: str, lines: int) -> str:
    """The name of a task, such as the path of a folder, in at most so many lines of 14 letters beside its tiles."""
    words = re.sub(r"[_\s]+", " ", label.replace("/", "/ "))
    return textwrap.fill(words, 14, max_lines=max(lines, 1), placeholder="...")


def strip_png(rows: Sequence[StripRow], budgets: Sequence[int]) -> bytes:
    """Return the strip as the bytes of a PNG file."""
    buffer = io.BytesIO()
    draw_strip(rows, budgets).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_strip(rows: Sequence[StripRow], budgets: Sequence[int], path: Path) -> None:
    """Write the strip as a PNG file.

    Raises:
        StorageError: if it cannot be written.
    """
    write(path, strip_png(rows, budgets))


def _head(pen: Any, lefts: list[int], wide: int, budgets: Sequence[int]) -> None:
    """Column titles, and a bracket over those that are decoded."""
    base = MARGIN + HEAD - 8
    for left, subscript in zip(lefts, ("t", "t+1"), strict=False):
        middle = left + wide / 2
        pen.text((middle, base), "o", INK, font=_font(17), anchor="rs")
        pen.text((middle + 1, base + 3), subscript, INK, font=_font(12), anchor="ls")
    for left, k in zip(lefts[2:], budgets, strict=True):
        pen.text((left + wide / 2, base), f"k = {k}", INK, font=_font(16), anchor="ms")
    first, last = lefts[2], lefts[-1] + wide
    middle = (first + last) / 2
    title = "decoded from the first k codes"
    half = pen.textlength(title, font=_font(13)) / 2 + 12
    line = MARGIN + 8
    if half < (last - first) / 2:
        for a, b in ((first, middle - half), (middle + half, last)):
            pen.line([(a, line), (b, line)], RULE, 2)
    pen.text((middle, line), title, MUTED, font=_font(13), anchor="mm")


def _font(size: int) -> Any:
    return need("PIL.ImageFont").load_default(size)
