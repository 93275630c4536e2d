"""octavo quantizes trained models after training, shows what that did to quality and where, and writes artifacts
that inference engines load.

Names are imported when they are first used: ``import octavo`` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from octavo.spec.version import VERSION as __version__

if TYPE_CHECKING:  # what a type checker and an editor see
    from octavo.errors import OctavoError, UserError, VerificationError
    from octavo.evaluate.tasks import parse_task
    from octavo.nn.lowered import lower
    from octavo.nn.register import register
    from octavo.nn.surgery import strip
    from octavo.numerics.conversions import convert
    from octavo.pipeline import Run, evaluate, export, load, plan, quantize, save, sensitivity, verify
    from octavo.sources.batches import batches
    from octavo.sources.data import open_data
    from octavo.sources.models import open_model
    from octavo.spec.recipe import Recipe, load_recipe

_HOMES = {
    "OctavoError": "errors",
    "Recipe": "spec.recipe",
    "Run": "pipeline",
    "UserError": "errors",
    "VerificationError": "errors",
    "batches": "sources.batches",
    "convert": "numerics.conversions",
    "evaluate": "pipeline",
    "export": "pipeline",
    "load": "pipeline",
    "load_recipe": "spec.recipe",
    "lower": "nn.lowered",
    "open_data": "sources.data",
    "open_model": "sources.models",
    "parse_task": "evaluate.tasks",
    "plan": "pipeline",
    "quantize": "pipeline",
    "register": "nn.register",
    "save": "pipeline",
    "sensitivity": "pipeline",
    "strip": "nn.surgery",
    "verify": "pipeline",
}

__all__ = [*_HOMES, "__version__"]


def _find(name: str) -> Any:
    return getattr(importlib.import_module(f"octavo.{_HOMES[name]}"), name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return _find(name)


def __dir__() -> list[str]:
    return __all__


class _Room(ModuleType):
    """A package that bears the name of a public function, and can be called as that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _find(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _House(ModuleType):
    """``octavo`` itself: rooms such as ``octavo.export`` become callable when they are first entered."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _House
