"""The strip of frames that an evaluation draws."""

from __future__ import annotations

import io

import numpy as np
import pytest
from evaluate_cases import frames_of

from flexlam_fast.evaluate.strip import GAP, HEAD, LABEL, MARGIN, StripRow, fit_label, pick, strip_png


def test_pick_prefers_movement_to_cuts_and_stillness() -> None:
    moves = np.linspace(0, 1, 100, dtype=np.float32)
    chosen = pick(moves, 3)
    assert chosen == [94, 82, 70]
    assert pick(np.ones(1, dtype=np.float32), 2) == [0]


def test_strip_shows_the_frames_enlarged() -> None:
    image_module = pytest.importorskip("PIL.Image")
    tiles = tuple(frames_of(7, 4).numpy())
    image = image_module.open(io.BytesIO(strip_png([StripRow("take_cover", tiles, ("a", "b", "c", "d"))], (1, 4))))
    pixels = np.asarray(image)
    top = MARGIN + HEAD
    for column, tile in enumerate(tiles):
        left = MARGIN + LABEL + column * (128 + GAP) + (GAP if column > 1 else 0)
        assert np.array_equal(pixels[top : top + 128 : 2, left : left + 128 : 2], tile)
        assert np.array_equal(pixels[top + 1 : top + 129 : 2, left + 1 : left + 129 : 2], tile)


def test_labels_stay_beside_their_tiles() -> None:
    assert fit_label("health_gathering", 6) == "health\ngathering"
    assert fit_label("robot arm/2023-04 day one", 6) == "robot arm/\n2023-04 day\none"
    long = fit_label("many_words_" * 30 + "x" * 400, 6).split("\n")
    assert len(long) == 6
    assert max(map(len, long)) <= 14
    assert long[-1].endswith("...")
    image_module, tiles = pytest.importorskip("PIL.Image"), tuple(np.zeros((4, 64, 64, 3), np.uint8))
    strip = strip_png([StripRow("x" * 400, tiles, ("", "", "", ""))], (1, 4))
    pixels, right = np.asarray(image_module.open(io.BytesIO(strip))), MARGIN + LABEL + 128
    assert (pixels[MARGIN + HEAD :, right : right + GAP] == 255).all()
