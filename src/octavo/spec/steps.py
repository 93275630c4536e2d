"""Steps of a recipe: algorithms in a stated order, with their options. Pure data.

In a recipe file::

    steps:
      - smoothquant: {alpha: 0.6}
      - gptq: {damping: 0.02}
        select: "*.mlp.*"           # only these layers; without it, every layer whose weight is quantized
      - gptq                        # all options as they are by default

To add a step, add a class here and a line in ``STEPS``, and its adapter in ``octavo.algorithms``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from octavo.errors import UserError
from octavo.spec.facts import SiteFacts
from octavo.spec.rule import nearest_of
from octavo.spec.select import parse_pattern

Number = int | float
Measure = Literal["plain", "importance", "gram"]
Place = Literal["residual", "heads", "online"]


class Options(BaseModel):
    """Options of one kind of step; the class's docstring is what users are told."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str] = ""
    moves: ClassVar[Literal["", "scales", "rotates", "branches off"]] = ""
    """What it does to inputs and weights before they are rounded."""

    @property
    def fixes(self) -> bool:
        """Weights are fixed afterwards."""
        return False

    @property
    def leaves(self) -> str:
        """What stays beside a layer for sure: ``low_rank``, ``rotation``, ``bias``; scales of inputs may be folded."""
        return ""


class SmoothQuant(Options):
    """Moves outliers of a layer's input into its weight, channel by channel (arXiv:2211.10438).

    ``alpha``: how much of its range the input loses, 0 to 1; ``search`` finds the best for each group of layers, up to
    0.9, which leaves room for larger inputs than calibration has seen.
    """

    name: ClassVar[str] = "smoothquant"
    moves: ClassVar = "scales"
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.5


class Gptq(Options):
    """Rounds a weight column by column, and each time lets the columns that are left make up for it (arXiv:2210.17323).

    ``act_order`` starts with the columns whose inputs are largest; groups stay where they are. ``scales`` says by what
    error scales are chosen beforehand, and ``sweeps`` how often codes and scales are gone over again afterwards.
    ``asymmetric`` moves weights to make up for the blocks before (arXiv:2504.02692). ``sequential`` lets layers learn
    from what those before them in the block were rounded to, for two more forwards up to there each time.
    ``rounded_inputs`` lets weights make up for what the input's own quantizer rounds away, for one more forward.
    """

    name: ClassVar[str] = "gptq"
    damping: float = Field(default=0.01, gt=0, le=1)
    act_order: bool = True
    block_size: int = Field(default=128, ge=1)
    scales: Measure = "gram"
    sweeps: int = Field(default=2, ge=0)
    asymmetric: bool = False
    sequential: bool = False
    rounded_inputs: bool = False

    @property
    def fixes(self) -> bool:
        """See ``Options.fixes``."""
        return True


class ScaleSearch(Options):
    """Rounds to nearest, with the scales that cost least of all that the format can store.

    ``measure``: of the weights' error plain, weighted by the mean square of the inputs, or by their Gram matrix.
    """

    name: ClassVar[str] = "scale_search"
    measure: Measure = "gram"

    @property
    def fixes(self) -> bool:
        """See ``Options.fixes``."""
        return True


class Awq(Options):
    """Scales input channels so that weights round well where inputs are large (arXiv:2306.00978).

    ``points`` are the powers that are looked at, a few first and then those around the best; ``clip`` then rounds, with
    the scales that cost least, else later steps round.
    Where inputs cannot be scaled, as those of experts in one tensor, it clips alone.
    """

    name: ClassVar[str] = "awq"
    moves: ClassVar = "scales"
    points: int = Field(default=33, ge=2)
    clip: bool = True

    @property
    def fixes(self) -> bool:
        """See ``Options.fixes``."""
        return self.clip


class SvdQuant(Options):
    """Puts a low-rank branch in full precision beside a weight (arXiv:2411.05007); later steps round the rest."""

    name: ClassVar[str] = "svdquant"
    moves: ClassVar = "branches off"
    rank: int = Field(default=32, ge=1)
    iterations: int = Field(default=2, ge=1)

    @property
    def leaves(self) -> str:
        """See ``Options.leaves``."""
        return "low_rank"


class Rotate(Options):
    """Spreads outliers of the input over blocks of channels by Hadamard rotations (arXiv:2404.00456, arXiv:2509.23202).

    ``block``: as wide as the weight's groups, the whole width, or a number of channels.
    ``where``: ``residual`` and ``heads`` go into weights, where the model's data flow allows it, before all other steps
    (R1 and R2 of arXiv:2405.16406); ``online`` rotates the inputs that are left at run time.
    """

    name: ClassVar[str] = "rotate"
    moves: ClassVar = "rotates"
    block: Annotated[int, Field(ge=2)] | Literal["group", "whole"] = "group"
    where: Annotated[tuple[Place, ...], Field(min_length=1)] = ("online",)

    @property
    def fused(self) -> frozenset[str]:
        """What is rotated in the weights."""
        return frozenset(self.where) - {"online"}

    @property
    def leaves(self) -> str:
        """See ``Options.leaves``."""
        return "rotation" if "online" in self.where else ""


class Equalize(Options):
    """Evens out the ranges of two layers in a row, channel by channel; needs no data (arXiv:1906.04721)."""

    name: ClassVar[str] = "equalize"
    moves: ClassVar = "scales"
    rounds: int = Field(default=2, ge=1)


class Hqq(Options):
    """Chooses zero points, or scales, by a norm that lets a few large errors be; needs no data (HQQ, 2023)."""

    name: ClassVar[str] = "hqq"
    p: float = Field(default=0.7, gt=0, le=1)
    iterations: int = Field(default=20, ge=1)

    @property
    def fixes(self) -> bool:
        """See ``Options.fixes``."""
        return True


class DoubleQuantization(Options):
    """Stores the scales of groups in 8 bits, in blocks with an fp32 scale, around their mean (arXiv:2305.14314, 3).

    ``scales`` is their element, ``block`` how many share a scale, ``centre`` whether their mean is subtracted first.
    Where the step stands does not matter: all others know how scales will be stored.
    """

    name: ClassVar[str] = "double_quantization"
    scales: Literal["dynamic8", "e4m3", "e5m2", "int8"] = "dynamic8"
    block: int = Field(default=256, ge=2)
    centre: bool = True


class BiasCorrection(Options):
    """Takes what rounding a weight adds to the mean of each output out of the bias again (arXiv:1906.04721, 4.2).

    Comes last; weights that no step has rounded are rounded to nearest. ``add`` gives a bias to layers without one.
    """

    name: ClassVar[str] = "bias_correction"
    add: bool = False

    @property
    def leaves(self) -> str:
        """See ``Options.leaves``."""
        return "bias" if self.add else ""


class LearnedRounding(Options):
    """Learns how all weights of a block are rounded from its outputs, by signed gradients (arXiv:2309.05516)."""

    name: ClassVar[str] = "learned_rounding"
    steps: int = Field(default=200, ge=1)
    rate: float = Field(default=0.01, gt=0, le=1)

    @property
    def fixes(self) -> bool:
        """See ``Options.fixes``."""
        return True


STEPS: dict[str, type[Options]] = {
    cls.name: cls
    for cls in (
        DoubleQuantization,
        Equalize,
        SmoothQuant,
        Awq,
        Rotate,
        SvdQuant,
        ScaleSearch,
        Hqq,
        Gptq,
        LearnedRounding,
        BiasCorrection,
    )
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its options, and the layers it is for (patterns on site names; empty: all).

    >>> make_step("smoothquant", {"alpha": 0.7}).options
    SmoothQuant(alpha=0.7)
    """

    options: Options
    select: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What recipes call it."""
        return self.options.name

    def __str__(self) -> str:
        return self.name + (f" on {', '.join(self.select)}" if self.select else "")

    def to_yaml_value(self) -> str | dict[str, Any]:
        """The shortest way to write it in a recipe."""
        given = self.options.model_dump(mode="json", exclude_defaults=True)
        if not given and not self.select:
            return self.name
        select = {"select": self.select[0] if len(self.select) == 1 else list(self.select)} if self.select else {}
        return {self.name: given, **select}


def make_step(name: str, options: Mapping[str, Any] | None = None, select: tuple[str, ...] = ()) -> Step:
    """A checked step.

    Raises:
        UserError: there is no such step, option or pattern; the message names the nearest ones.
    """
    cls = STEPS.get(name)
    if cls is None:
        raise UserError(f"unknown step {name!r}: {nearest_of(name, STEPS)}steps are {', '.join(STEPS)}")
    for pattern in select:
        parse_pattern(pattern)
    try:
        return Step(cls(**(options or {})), select)
    except ValidationError as error:
        raise UserError(f"step {name}: {_explain(error, cls)}") from error


def matcher(step: Step, sites: Sequence[SiteFacts]) -> frozenset[str]:
    """Names of the sites that a step is for.

    Raises:
        UserError: one of its patterns matches none of them.
    """
    if not step.select:
        return frozenset(site.name for site in sites)
    found: set[str] = set()
    for text in step.select:
        pattern = parse_pattern(text)
        names = {site.name for site in sites if pattern.matches(site)}
        if not names:
            near = nearest_of(text, [site.name for site in sites])
            raise UserError(
                f"step {step.name}: {text!r} matches no layer whose weight is quantized; {near}".rstrip("; ")
            )
        found |= names
    return frozenset(found)


def parse_step(value: object) -> Step:
    """A step as a recipe file has it: a name, or a mapping of the name to its options, with ``select`` beside it.

    Raises:
        UserError: it is written in some other way, or ``make_step`` refuses it.
    """
    match value:
        case str():
            return make_step(value)
        case dict():
            rest = {key: entry for key, entry in value.items() if key != "select"}
            if len(rest) != 1:
                raise UserError(f"a step is one name with its options, and select beside it; this has {_names(rest)}")
            ((name, options),) = rest.items()
            if not isinstance(options, dict | None):
                raise UserError(f"step {name}: options are a mapping such as {{alpha: 0.5}}, not {options!r}")
            return make_step(str(name), options, _patterns(value.get("select", [])))
        case _:
            raise UserError(f"a step is a name, or a name with options, not {value!r}")


def _names(rest: Mapping[object, object]) -> str:
    return ", ".join(map(repr, rest)) or "none"


def _patterns(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    raise UserError(f"select takes a pattern or a list of patterns, not {value!r}")


def _explain(error: ValidationError, cls: type[Options]) -> str:
    first = error.errors()[0]
    option = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = tuple(cls.model_fields)
        return f"unknown option {option!r}: {nearest_of(option, known)}options are {', '.join(known) or 'none'}"
    return f"{option}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {first['input']!r}"
