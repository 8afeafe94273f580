"""One size from another: what is used for its speed must give what Pillow gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handler import resizing
from handler.resizing import resized

SIDES = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_bilinear_is_pillows_but_for_one_level(width: int, height: int, to_width: int, to_height: int, seed: int) -> None:
    """Models are trained on one machine and serve on another, where Pillow may do it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    photo = Image.fromarray(noise)
    ours = resized(photo, to_width, to_height, "bilinear")
    pillows = np.asarray(photo.resize((to_width, to_height), Image.Resampling.BILINEAR))
    assert ours.shape == (to_height, to_width, 3)
    assert np.abs(ours.astype(int) - pillows.astype(int)).max() <= 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_without_the_faster_library_and_for_other_filters_it_is_pillow(
    interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if interpolation == "bilinear":
        monkeypatch.setattr(resizing, "cykooz_resizer", None)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8))
    expected = photo.resize((40, 50), Image.Resampling[interpolation.upper()])
    assert np.array_equal(resized(photo, 40, 50, interpolation), np.asarray(expected))
