"""What is said about a scene."""

from octavo.demo.dice import Dice
from octavo.demo.pictures import Scene, Thing
from octavo.demo.sampling import COLOURS, SHAPES, SIZES, TEXTURE_NAMES

TEMPLATES = (
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "there is a {}",
    "a drawing of one {}",
)
"""How a caption begins and ends; the braces hold the object, or two and how they lie."""

_LEFT = ("left of", "to the left of")
_RIGHT = ("right of", "to the right of")
_ABOVE = ("above", "over")
_BELOW = ("below", "under")


def vocabulary() -> tuple[str, ...]:
    """Every word that captions are made of, sorted."""
    sentences = (*TEMPLATES, *_LEFT, *_RIGHT, *_ABOVE, *_BELOW, *COLOURS, *SHAPES, *SIZES, *TEXTURE_NAMES)
    return tuple(sorted({word for sentence in sentences for word in sentence.split() if word != "{}"}))


def short_name(shape: str, colour: str) -> str:
    """Name of a class of shapes-100.

    >>> short_name("circle", "red")
    'red circle'
    """
    return f"{colour} {shape}"


def full_name(shape: str, colour: str, texture: str, size: str) -> str:
    """Name of a class of shapes-1k.

    >>> full_name("circle", "red", "striped", "small")
    'small red striped circle'
    """
    return f"{size} {colour} {texture} {shape}"


def caption(scene: Scene, dice: Dice) -> str:
    """One of the many true captions of ``scene``."""
    template = dice.pick(TEMPLATES)
    if len(scene.things) == 1:
        return template.format(_some_words(scene.things[0], dice))
    first, second = scene.things
    sideways = abs(first.x - second.x) > abs(first.y - second.y)
    forwards, backwards = (_LEFT, _RIGHT) if sideways else (_ABOVE, _BELOW)
    if dice.chance(50):
        return template.format(_relate(first, forwards, second, dice))
    return template.format(_relate(second, backwards, first, dice))


def _relate(subject: Thing, relation: tuple[str, ...], other: Thing, dice: Dice) -> str:
    return f"{_some_words(subject, dice)} {dice.pick(relation)} a {_some_words(other, dice)}"


def _some_words(thing: Thing, dice: Dice) -> str:
    """Colour and shape always, size and texture in three cases of four."""
    size = f"{thing.size} " if dice.chance(75) else ""
    texture = f"{thing.texture} " if dice.chance(75) else ""
    return f"{size}{thing.colour_name} {texture}{thing.shape}"
