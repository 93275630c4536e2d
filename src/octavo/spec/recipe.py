"""Recipes: rules that say which parts of a model get which format, and how ranges are found.

A recipe comes with the package, is read from a YAML file, or is built in Python::

    recipe = load_recipe("fp8-attention").leave("*patch_embedding*", why="costs 2 points of R@1")

A recipe file::

    name: mine
    description: one sentence
    extends: fp8                # optional: the rules of a preset or another file come first
    rules:                      # applied in order; a later rule wins, slot by slot
      - select: ["operation:linear", "type:Conv1d"]       # or a single pattern; see ``select``
        scheme: {weight: e4m3-tensor, input: {format: e4m3-tensor, observer: percentile, percentile: 99.9}}
      - select: "*patch_embedding*"
        leave: why, in free text                          # or  leave: true
      - select: "*.router"
        leave: decides which experts run
        optional: true          # may match nothing; without it every pattern must match
    steps:                      # algorithms, in this order; see ``steps``
      - smoothquant: {alpha: 0.6}
        select: "*.mlp.*"
      - gptq
    calibration: {observer: absmax, percentile: 99.99, samples: 512, batch_size: 32, inputs: auto, experts: share,
                  expert_tokens: 32}

The steps of a file replace those of the recipe that it extends.

Slots are the values of ``Slot``; formats are listed by ``octavo formats``. A ``token`` or ``group`` format of an
activation is dynamic; a ``tensor`` format is static unless ``dynamic: true``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from octavo.errors import UserError
from octavo.spec.experts import ExpertsPolicy
from octavo.spec.facts import Slot
from octavo.spec.plan import ObserverSpec, QuantizerSpec
from octavo.spec.recipe_file import RecipeFile
from octavo.spec.rule import Leave, Rule, SlotRule, nearest_of, slot_named, slot_rule
from octavo.spec.steps import Step, make_step
from octavo.spec.tensor_format import TensorFormat

_DEEPEST_EXTENDS = 8
INPUTS = ("auto", "quantized", "unquantized")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Defaults of calibration; the command line may override them.

    Args:
        observer: How static activation ranges are found, where a rule does not say.
        samples: Samples of the data that are used.
        batch_size: Samples per forward pass.
        experts: What becomes of experts that the samples hardly reach.
        inputs: What steps see of a block's inputs: those that come through the ``quantized`` blocks before it, or the
            ``unquantized`` ones; ``auto`` takes the former where some step can make up for earlier errors.
    """

    observer: ObserverSpec = field(default_factory=ObserverSpec)
    samples: int = 512
    batch_size: int = 32
    experts: ExpertsPolicy = field(default_factory=ExpertsPolicy)
    inputs: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"calibration {name} is {value}: it must be at least 1")
        if self.inputs not in INPUTS:
            raise UserError(f"calibration inputs are {', '.join(INPUTS)}, not {self.inputs!r}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules in order (a later one wins, slot by slot) and how to calibrate.

    Args:
        name: What plans and records call it.
        rules: Applied in order.
        description: One sentence.
        calibration: Defaults of calibration.
        aliases: Other names of a preset.
        steps: Algorithms, in the order in which they work on each block.
    """

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    aliases: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    def leave(self, *patterns: str, why: str = "", origin: str = "") -> Recipe:
        """A new recipe that leaves out what the patterns select: whole sites, or single quantizers.

        >>> Recipe("mine", ()).leave("*patch_embedding*").rules[0].action
        Leave(why='')
        """
        return self._with_rule(Rule(patterns, Leave(why), origin=origin or "leave()"))

    def quantize(self, *patterns: str, origin: str = "", **formats: str | TensorFormat) -> Recipe:
        """A new recipe that gives what the patterns select other formats, by slot.

        >>> Recipe("mine", ()).quantize("*.fc1", weight="int8-channel").rules[0].to_dict()
        {'select': '*.fc1', 'scheme': {'weight': 'int8-channel'}}
        """
        scheme = {slot: slot_rule(slot, fmt) for slot, fmt in ((slot_named(key), fmt) for key, fmt in formats.items())}
        return self._with_rule(Rule(patterns, scheme, origin=origin or "quantize()"))

    def with_steps(self, *steps: Step | str) -> Recipe:
        """A new recipe with these steps in place of its own.

        >>> [str(step) for step in Recipe("mine", ()).with_steps("gptq").steps]
        ['gptq']
        """
        return dataclasses.replace(self, steps=tuple(make_step(s) if isinstance(s, str) else s for s in steps))

    def _with_rule(self, rule: Rule) -> Recipe:
        return dataclasses.replace(self, rules=(*self.rules, rule))

    def with_observer(self, name: str, percentile: float | None = None) -> Recipe:
        """A new recipe that finds static activation ranges this way, where a rule does not name an observer itself."""
        kept = self.calibration.observer.percentile if percentile is None else percentile
        return self.with_calibration(observer=ObserverSpec(name, kept))

    def with_calibration(
        self,
        *,
        observer: ObserverSpec | None = None,
        samples: int | None = None,
        batch_size: int | None = None,
        experts: ExpertsPolicy | None = None,
    ) -> Recipe:
        """A new recipe with other defaults of calibration; ``None`` keeps what is there."""
        now = self.calibration
        calibration = Calibration(
            observer or now.observer,
            now.samples if samples is None else samples,
            now.batch_size if batch_size is None else batch_size,
            experts or now.experts,
            now.inputs,
        )
        return dataclasses.replace(self, calibration=calibration)

    def origin(self, index: int) -> str:
        """How messages name a rule: ``fp8 rule 1``, or where it was added."""
        return self.rules[index].origin or f"{self.name} rule {index + 1}"

    def quantizer(self, slot: Slot, wanted: SlotRule) -> QuantizerSpec:
        """What a slot gets, with the recipe's default observer filled in."""
        default = ObserverSpec() if slot is Slot.WEIGHT or wanted.is_dynamic else self.calibration.observer
        return QuantizerSpec(wanted.format, wanted.is_dynamic, wanted.observer or default)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as a recipe file has them."""
        observer = self.calibration.observer
        calibration = {
            "observer": observer.name,
            "percentile": observer.percentile,
            "samples": self.calibration.samples,
            "batch_size": self.calibration.batch_size,
            **self.calibration.experts.to_dict(),
            "inputs": self.calibration.inputs,
        }
        head: dict[str, Any] = {"name": self.name}
        head |= {"description": self.description} if self.description else {}
        head |= {"aliases": list(self.aliases)} if self.aliases else {}
        steps = {"steps": [step.to_yaml_value() for step in self.steps]} if self.steps else {}
        return {**head, "rules": [rule.to_dict() for rule in self.rules], **steps, "calibration": calibration}

    def to_yaml(self) -> str:
        """The recipe as a file that ``load_recipe`` reads back."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100))


def load_recipe(source: str | Path | Recipe) -> Recipe:
    """The preset of this name, the recipe in this file, or the recipe itself.

    Raises:
        UserError: there is no such preset or file, or the file is not a recipe; the message names file and line.
    """
    return _load(source, depth=0)


def presets() -> tuple[Recipe, ...]:
    """Every recipe that comes with the package, by name."""
    return tuple(_preset(name) for name in _preset_files())


def preset_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, without aliases."""
    return tuple(_preset_files())


def read_recipe(text: str, source: str, *, default_name: str = "recipe") -> Recipe:
    """The recipe that ``text`` holds; messages call the text ``source``."""
    return _build(RecipeFile(text, source), default_name, is_preset=False, depth=0)


def _load(source: str | Path | Recipe, depth: int) -> Recipe:
    if isinstance(source, Recipe):
        return source
    if depth > _DEEPEST_EXTENDS:
        raise UserError(f"recipe {str(source)!r}: more than {_DEEPEST_EXTENDS} recipes extend each other in turn")
    if isinstance(source, str) and (name := _preset_called(source)):
        return _preset(name)
    if isinstance(source, str) and not _looks_like_path(source):
        known = [*preset_names(), *(alias for recipe in presets() for alias in recipe.aliases)]
        raise UserError(
            f"unknown recipe {source!r}: {nearest_of(source, known)}"
            f"presets are {', '.join(preset_names())}; a file is written as a path, ./{source}.yaml"
        )
    path = Path(source)
    return _build(RecipeFile(_read_text(path), str(path)), path.stem, is_preset=False, depth=depth)


def _looks_like_path(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source or "\\" in source or Path(source).is_file()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a recipe is a text file in UTF-8 ({error.reason} at byte {error.start})") from error


def _build(file: RecipeFile, default_name: str, *, is_preset: bool, depth: int) -> Recipe:
    content = file.content
    name = content.name or default_name
    base = _base(file, depth)
    rules = (*base.rules, *file.rules(name, is_preset=is_preset))
    if not rules:
        file.fail((), "a recipe without rules quantizes nothing: add a rule, or 'extends: fp8'")
    steps = base.steps if content.steps is None else file.steps()
    return Recipe(name, rules, content.description, _calibration(file, base), tuple(content.aliases), steps)


def _base(file: RecipeFile, depth: int) -> Recipe:
    extends = file.content.extends
    if not extends:
        return Recipe("", ())
    is_file_here = extends.endswith((".yaml", ".yml"))
    try:
        return _load(str(Path(file.source).parent / extends) if is_file_here else extends, depth + 1)
    except UserError as error:
        file.fail(("extends",), f"cannot extend {extends!r}: {error}")


def _calibration(file: RecipeFile, base: Recipe) -> Calibration:
    part = file.content.calibration
    if part is None:
        return base.calibration
    try:
        experts = ExpertsPolicy.of(part.experts, part.expert_tokens)
        observer = ObserverSpec(part.observer, part.percentile)
        return Calibration(observer, part.samples, part.batch_size, experts, part.inputs)
    except UserError as error:
        file.fail(("calibration",), str(error))


@cache
def _preset_files() -> dict[str, str]:
    """Name -> text of the preset files."""
    folder = resources.files("octavo.spec").joinpath("presets")
    files = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files)}


@cache
def _preset(name: str) -> Recipe:
    file = RecipeFile(_preset_files()[name], f"presets/{name}.yaml")
    return _build(file, name, is_preset=True, depth=0)


def _preset_called(name: str) -> str:
    """The preset's own name for one of its names, empty when there is none."""
    if name in _preset_files():
        return name
    return next((recipe.name for recipe in presets() if name in recipe.aliases), "")
