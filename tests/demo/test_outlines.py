"""Areas against geometry: the fields are distances, so what they cover is known."""

from math import pi

import numpy as np
import pytest

from octavo.demo.outlines import OUTLINES, TEXTURES

RADIUS = 100.0


@pytest.fixture(scope="module")
def grid():
    axis = np.arange(-150, 150, dtype=np.float64) + 0.5
    return np.meshgrid(axis, axis)


def area(name, grid):
    """In units of the squared radius."""
    return np.count_nonzero(OUTLINES[name](*grid, RADIUS) > 0) / RADIUS**2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("circle", pi * 0.95**2),
        ("ring", pi * (1 - 0.5**2)),
        ("square", 1.6**2),
        ("diamond", 2 / 1.6),
        ("cross", 4 * 0.95 * 0.64 - 0.64**2),
    ],
)
def test_area(name, expected, grid):
    assert area(name, grid) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", OUTLINES)
def test_every_shape_is_there_and_of_about_its_radius(name, grid):
    inside = OUTLINES[name](*grid, RADIUS) > 0
    u, v = grid
    assert np.sqrt(u * u + v * v)[inside].max() < 1.3 * RADIUS
    assert 0.4 < area(name, grid) < pi


@pytest.mark.parametrize("name", sorted(TEXTURES.keys() - {"plain"}))
def test_textures_have_two_tones(name, grid):
    second = TEXTURES[name](*grid, 6.0) > 0
    assert 0.2 < second.mean() < 0.8


def test_plain_has_one_tone(grid):
    assert not np.any(TEXTURES["plain"](*grid, 6.0) > 0)
