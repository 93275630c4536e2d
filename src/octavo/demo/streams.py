"""Endless streams of scenes and what is said about them."""

from collections.abc import Iterator
from functools import partial

from octavo.demo.captions import caption
from octavo.demo.dice import Dice
from octavo.demo.pictures import Scene
from octavo.demo.sampling import USUAL, Clutter, Look, Split, alike_but_one, any_look, one_thing, sample, two_things


def described_scenes(split: Split, name: str) -> Iterator[tuple[Scene, str]]:
    """Scenes of ``split`` and their captions, without end: half of them show one object, half show two.

    ``name`` is the seed: another name, another stream.
    """
    dice = Dice(f"{split.value}, {name}")
    while True:
        compose = any_two if dice.chance(50) else _any_one
        scene = sample(split, dice, compose)
        yield scene, caption(scene, dice)


def described_families(split: Split, name: str) -> Iterator[tuple[Scene, str]]:
    """As ``described_scenes``, but in families: one object of each member differs from the others' in one word.

    Beside such relatives a caption is found only by who looks closely.
    """
    dice = Dice(f"{split.value} families, {name}")
    while True:
        others = [any_look(dice)] if dice.chance(30) else []
        for look in alike_but_one(dice):
            scene = sample(split, dice, partial(_with_looks, looks=[look, *others]))
            yield scene, caption(scene, dice)


def _with_looks(dice: Dice, looks: list[Look]) -> Scene:
    if len(looks) == 1:
        return one_thing(dice, looks[0])
    first, second = looks if dice.chance(50) else looks[::-1]
    return two_things(dice, first, second)


def _any_one(dice: Dice) -> Scene:
    return one_thing(dice, any_look(dice))


def any_two(dice: Dice, clutter: Clutter = USUAL) -> Scene:
    """A scene of two objects of any look."""
    return two_things(dice, any_look(dice), any_look(dice), clutter)
