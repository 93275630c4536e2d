"""Draws scenes by lot, and keeps training, calibration and test apart.

A scene belongs to a split by what it shows: the hash of its objects, as they look and where they lie, decides. Two
splits therefore share no scene, whatever the seeds, the background or the noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import cast

from octavo.demo.dice import Dice, fingerprint
from octavo.demo.outlines import OUTLINES, TEXTURES
from octavo.demo.pictures import SIZE, UNIT, Colour, Scene, Stroke, Thing

COLOURS: dict[str, Colour] = {
    "red": (205, 45, 45),
    "orange": (235, 125, 30),
    "yellow": (230, 210, 60),
    "green": (60, 160, 70),
    "teal": (40, 165, 165),
    "blue": (55, 85, 205),
    "purple": (130, 60, 175),
    "pink": (235, 130, 175),
    "brown": (130, 85, 50),
    "white": (235, 235, 235),
}
SHAPES = tuple(OUTLINES)
TEXTURE_NAMES = tuple(TEXTURES)
SIZES = ("small", "large")

_RADII = {"small": (7 * UNIT + 8, 8 * UNIT + 8), "large": (10 * UNIT + 8, 12 * UNIT)}
_SHADE = 20
_TURN = 5
_FAMILY_SIZE = 8

Look = tuple[str, str, str, str]
"""Shape, colour, texture, size."""


@dataclass(frozen=True, slots=True)
class Clutter:
    """What makes a picture hard: strokes, how many in a hundred of them lie in front, and grain in levels."""

    most_strokes: int
    percent_in_front: int
    least_noise: int
    most_noise: int


USUAL = Clutter(most_strokes=2, percent_in_front=25, least_noise=4, most_noise=16)
HEAVY = Clutter(most_strokes=4, percent_in_front=50, least_noise=8, most_noise=36)
"""That of the test pictures, harder than what was trained and calibrated on."""


class Split(Enum):
    """What a scene may be used for."""

    TRAINING = "training"
    CALIBRATION = "calibration"
    TEST = "test"


_SHARES = (Split.TRAINING, Split.TRAINING, Split.CALIBRATION, Split.TEST)


def scene_key(scene: Scene) -> str:
    """The objects of ``scene``, as they look and where they lie, in words and integers."""
    return "; ".join(
        f"{t.size} {t.colour_name} {t.texture} {t.shape} at {t.x} {t.y} radius {t.radius} turn {t.turn} shift {t.shift}"
        for t in scene.things
    )


def split_of(scene: Scene) -> Split:
    """The one split that ``scene`` belongs to: half of all scenes are for training, a quarter for each other."""
    return _SHARES[fingerprint(scene_key(scene)) % len(_SHARES)]


def sample(split: Split, dice: Dice, compose: Callable[[Dice], Scene]) -> Scene:
    """The first scene of ``split`` that ``compose`` brings."""
    while True:
        scene = compose(dice)
        if split_of(scene) is split:
            return scene


def any_look(dice: Dice) -> Look:
    """A look by lot."""
    return dice.pick(SHAPES), dice.pick(tuple(COLOURS)), dice.pick(TEXTURE_NAMES), dice.pick(SIZES)


def alike_but_one(dice: Dice) -> list[Look]:
    """Up to eight looks that differ in one word only: the shape in three cases of five, the colour, the texture."""
    look = any_look(dice)
    place = dice.pick((0, 0, 0, 1, 2))
    words = list((SHAPES, tuple(COLOURS), TEXTURE_NAMES)[place])
    chosen = [words.pop(dice.between(0, len(words) - 1)) for _ in range(min(_FAMILY_SIZE, len(words)))]
    before, after = look[:place], look[place + 1 :]
    return [cast(Look, (*before, word, *after)) for word in chosen]


def one_thing(dice: Dice, look: Look, clutter: Clutter = USUAL) -> Scene:
    """A scene of one object that looks like ``look``, somewhere."""
    low, high = 19 * UNIT, (SIZE - 19) * UNIT
    return _surround(dice, (_thing(dice, look, x=dice.between(low, high), y=dice.between(low, high)),), clutter)


def two_things(dice: Dice, look: Look, other: Look, clutter: Clutter = USUAL) -> Scene:
    """A scene of two objects: the first is left of the second, or above it."""
    near, far = dice.between(11 * UNIT, 14 * UNIT), dice.between(34 * UNIT, 37 * UNIT)
    middle = SIZE * UNIT // 2
    low, high = middle - 5 * UNIT, middle + 5 * UNIT
    across, other_across = dice.between(low, high), dice.between(low, high)
    if dice.chance(50):
        things = _thing(dice, look, x=near, y=across), _thing(dice, other, x=far, y=other_across)
    else:
        things = _thing(dice, look, x=across, y=near), _thing(dice, other, x=other_across, y=far)
    return _surround(dice, things, clutter)


def _thing(dice: Dice, look: Look, *, x: int, y: int) -> Thing:
    shape, colour_name, texture, size = look
    return Thing(
        shape=shape,
        texture=texture,
        size=size,
        colour_name=colour_name,
        colour=COLOURS[colour_name],
        shade=_tint(dice, 0, 0, _SHADE),
        x=x,
        y=y,
        radius=dice.between(*_RADII[size]),
        turn=dice.between(-_TURN, _TURN),
        shift=dice.between(-2 * UNIT, 2 * UNIT),
    )


def _tint(dice: Dice, low: int, high: int, spread: int) -> Colour:
    """A grey from ``low`` to ``high``, each channel moved by up to ``spread``."""
    grey = dice.between(low, high)
    red, green, blue = (grey + dice.between(-spread, spread) for _ in range(3))
    return red, green, blue


def _surround(dice: Dice, things: tuple[Thing, ...], clutter: Clutter) -> Scene:
    return Scene(
        things=things,
        strokes=tuple(_stroke(dice, clutter) for _ in range(dice.between(0, clutter.most_strokes))),
        background=(_tint(dice, 60, 180, 25), _tint(dice, 60, 180, 25)),
        noise=dice.between(clutter.least_noise, clutter.most_noise),
        noise_seed=dice.bits(),
    )


def _stroke(dice: Dice, clutter: Clutter) -> Stroke:
    return Stroke(
        x=dice.between(0, SIZE * UNIT),
        y=dice.between(0, SIZE * UNIT),
        length=dice.between(4 * UNIT, 14 * UNIT),
        width=dice.between(UNIT // 2, 3 * UNIT // 2),
        turn=dice.between(-64, 64),
        colour=_tint(dice, 60, 190, 50),
        in_front=dice.chance(clutter.percent_in_front),
    )
