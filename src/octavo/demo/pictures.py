"""Scenes and how they are drawn.

A scene is a handful of integers; ``draw`` turns it into the same bytes on every machine.
Lengths are in sixteenths of a pixel, colours are 8-bit RGB.
"""

from dataclasses import dataclass

import numpy as np

from octavo.demo.dice import random_bytes
from octavo.demo.outlines import OUTLINES, TEXTURES

SIZE = 48
UNIT = 16
TURNS = 64

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object, and exactly where and how it is drawn.

    ``size`` is the word of captions, ``radius`` is what is drawn. ``turn`` is the tangent of half the angle, times
    ``TURNS``; ``shift`` moves the texture; ``shade`` is added to the three channels of the colour.
    """

    shape: str
    texture: str
    size: str
    colour_name: str
    colour: Colour
    shade: Colour
    x: int
    y: int
    radius: int
    turn: int
    shift: int


@dataclass(frozen=True, slots=True)
class Stroke:
    """A straight line that no caption speaks of; in front of the objects it hides a part of them."""

    x: int
    y: int
    length: int
    width: int
    turn: int
    colour: Colour
    in_front: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that decides a picture. The background runs from the first colour at the top to the second below."""

    things: tuple[Thing, ...]
    strokes: tuple[Stroke, ...]
    background: tuple[Colour, Colour]
    noise: int
    noise_seed: int


def draw(scene: Scene) -> np.ndarray:
    """The picture of ``scene``: ``(SIZE, SIZE, 3)``, uint8."""
    canvas = _backdrop(*scene.background)
    for stroke in scene.strokes:
        if not stroke.in_front:
            _draw_stroke(canvas, stroke)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    for stroke in scene.strokes:
        if stroke.in_front:
            _draw_stroke(canvas, stroke)
    return _develop(canvas, scene)


def draw_all(scenes: list[Scene]) -> np.ndarray:
    """The pictures of ``scenes``: ``(num_scenes, SIZE, SIZE, 3)``, uint8."""
    pictures = np.empty((len(scenes), SIZE, SIZE, 3), dtype=np.uint8)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture[:] = draw(scene)
    return pictures


def _backdrop(top: Colour, bottom: Colour) -> np.ndarray:
    """``(SIZE, SIZE, 3)``, float64: one colour runs into the other."""
    weight = (np.arange(SIZE, dtype=np.float64) / (SIZE - 1))[:, None, None]
    start, end = np.array(top, dtype=np.float64), np.array(bottom, dtype=np.float64)
    return np.broadcast_to(start + weight * (end - start), (SIZE, SIZE, 3)).copy()


def _own_frame(x: int, y: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixels, twice ``(SIZE, SIZE)``, in the frame of an object at ``x, y``.

    Cosine and sine by the tangent of half the angle, without a cosine or a sine.
    """
    half = turn / TURNS
    cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    pixels = np.arange(SIZE, dtype=np.float64) + 0.5
    right, down = (pixels - x / UNIT)[None, :], (pixels - y / UNIT)[:, None]
    return right * cos + down * sin, down * cos - right * sin


def _coverage(distance: np.ndarray) -> np.ndarray:
    """How much of each pixel lies inside, 0 to 1, from the signed distance of its centre to the edge."""
    return np.minimum(np.maximum(distance + 0.5, 0.0), 1.0)


def _blend(canvas: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    canvas += coverage[:, :, None] * (colour - canvas)


def _draw_thing(canvas: np.ndarray, thing: Thing) -> None:
    u, v = _own_frame(thing.x, thing.y, thing.turn)
    radius, shift = thing.radius / UNIT, thing.shift / UNIT
    inside = _coverage(OUTLINES[thing.shape](u, v, radius))
    period = 3.0 + radius / 3.0
    second = _coverage(TEXTURES[thing.texture](u + shift, v + shift, period))
    colour = np.array(thing.colour, dtype=np.float64) + np.array(thing.shade, dtype=np.float64)
    tones = colour * (1.0 - 0.35 * second[:, :, None])
    _blend(canvas, inside, tones)


def _draw_stroke(canvas: np.ndarray, stroke: Stroke) -> None:
    u, v = _own_frame(stroke.x, stroke.y, stroke.turn)
    inside = np.minimum(stroke.length / UNIT - np.abs(u), stroke.width / UNIT - np.abs(v))
    _blend(canvas, _coverage(inside), np.array(stroke.colour, dtype=np.float64))


def _develop(canvas: np.ndarray, scene: Scene) -> np.ndarray:
    """Adds grain of at most ``scene.noise`` levels to either side and rounds to bytes."""
    grain = random_bytes(scene.noise_seed, canvas.shape).astype(np.float64) - 127.5
    exposed = canvas + grain * (scene.noise / 127.5)
    return np.floor(np.minimum(np.maximum(exposed, 0.0), 255.0) + 0.5).astype(np.uint8)
