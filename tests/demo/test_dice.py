import pytest

from octavo.demo.dice import Dice, random_bytes

PUBLISHED_SEED = 1234567
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
"""The first outputs of SplitMix64 that Rosetta Code lists for ``PUBLISHED_SEED``."""


def test_bytes_are_the_published_stream():
    words = random_bytes(PUBLISHED_SEED, (5, 8))
    assert [int.from_bytes(bytes(word), "little") for word in words] == PUBLISHED


def test_dice_and_bytes_run_through_the_same_stream():
    dice = Dice("any name")
    words = random_bytes(Dice("any name")._counter, (4, 8))
    assert [int.from_bytes(bytes(word), "little") for word in words] == [dice.bits() for _ in range(4)]


def test_names_make_different_streams():
    assert Dice("one").bits() != Dice("two").bits()


@pytest.mark.parametrize(("low", "high"), [(0, 0), (-3, 3), (5, 11)])
def test_between_reaches_both_ends_and_nothing_else(low, high):
    dice = Dice("ends")
    assert {dice.between(low, high) for _ in range(500)} == set(range(low, high + 1))


def test_chance_is_a_percentage():
    dice = Dice("percent")
    assert sum(dice.chance(75) for _ in range(10_000)) == pytest.approx(7500, abs=150)
    assert not any(dice.chance(0) for _ in range(100))
    assert all(dice.chance(100) for _ in range(100))
