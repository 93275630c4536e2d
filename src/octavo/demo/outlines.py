"""The ten shapes and five textures, as arithmetic on coordinates.

Every function takes the coordinates of pixels in the object's own frame, ``u`` to its right and ``v`` downwards,
both ``(height, width)`` and in pixels. Only ``+ - * /``, square roots, comparisons and rounding are used: IEEE 754
fixes their last bit, so the pictures are the same everywhere (those of a sine would not be).
"""

from collections.abc import Callable

import numpy as np

Field = np.ndarray
Outline = Callable[[Field, Field, float], Field]

# Unit normals at 72 degrees from each other, the first one down: the five lines that make a star.
_FIVE = ((0.0, 1.0), (0.951057, 0.309017), (0.587785, -0.809017), (-0.587785, -0.809017), (-0.951057, 0.309017))
_COS_30 = 0.866025
_DIAGONAL = 0.707107


def _circle(u: Field, v: Field, r: float) -> Field:
    return 0.95 * r - np.sqrt(u * u + v * v)


def _ring(u: Field, v: Field, r: float) -> Field:
    distance = np.sqrt(u * u + v * v)
    return np.minimum(r - distance, distance - 0.5 * r)


def _crescent(u: Field, v: Field, r: float) -> Field:
    return np.minimum(_circle(u, v, r), -_circle(u - 0.5 * r, v, 0.85 * r))


def _square(u: Field, v: Field, r: float) -> Field:
    return 0.8 * r - np.maximum(np.abs(u), np.abs(v))


def _diamond(u: Field, v: Field, r: float) -> Field:
    return 0.85 * (r - 1.6 * np.abs(u) - np.abs(v))


def _triangle(u: Field, v: Field, r: float) -> Field:
    sides = 0.45 * r - np.abs(u) * _COS_30 + (v - 0.1 * r) * 0.5
    return np.minimum(sides + 0.1 * r, 0.7 * r - v)


def _hourglass(u: Field, v: Field, r: float) -> Field:
    return np.minimum(0.95 * r - np.abs(v), 0.8 * (0.8 * np.abs(v) + 0.1 * r - np.abs(u)))


def _cross(u: Field, v: Field, r: float) -> Field:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.minimum(0.95 * r - long, 0.32 * r - short)


def _star(u: Field, v: Field, r: float) -> Field:
    """Inside where at most one of the five lines has the point on its far side: the second smallest distance."""
    smallest = second = np.full_like(u, np.inf)
    for normal_u, normal_v in _FIVE:
        distance = 0.4 * r - u * normal_u - v * normal_v
        second = np.minimum(second, np.maximum(smallest, distance))
        smallest = np.minimum(smallest, distance)
    return second


def _heart(u: Field, v: Field, r: float) -> Field:
    side = np.abs(u)
    lobe = 0.55 * r - np.sqrt((side - 0.45 * r) * (side - 0.45 * r) + (v + 0.3 * r) * (v + 0.3 * r))
    below = np.minimum(0.86 * r - side - v, v + 0.3 * r) * _DIAGONAL
    return np.maximum(lobe, below)


OUTLINES: dict[str, Outline] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "crescent": _crescent,
    "hourglass": _hourglass,
    "diamond": _diamond,
}
"""Shape -> signed distance to its outline, in pixels (about), positive inside, of a shape of radius ``r``."""


def _wave(x: Field, period: float) -> Field:
    """Triangle wave from -1/4 to 1/4, times the period: the distance in pixels to the next edge of a stripe."""
    phase = x / period
    return (np.abs(phase - np.floor(phase) - 0.5) - 0.25) * period


def _stripes(u: Field, v: Field, period: float) -> Field:
    return _wave(v, period)


def _checks(u: Field, v: Field, period: float) -> Field:
    across, down = _wave(u, 1.4 * period), _wave(v, 1.4 * period)
    return np.minimum(np.abs(across), np.abs(down)) * np.sign(across) * np.sign(down)


def _dots(u: Field, v: Field, period: float) -> Field:
    across, down = u - np.rint(u / period) * period, v - np.rint(v / period) * period
    return 0.32 * period - np.sqrt(across * across + down * down)


TEXTURES: dict[str, Outline] = {
    "plain": lambda u, v, period: np.full_like(u, -1.0),
    "striped": _stripes,
    "checkered": _checks,
    "dotted": _dots,
    "halved": lambda u, v, period: u,
}
"""Texture -> signed distance in pixels to where the second tone begins, positive in the second tone."""
