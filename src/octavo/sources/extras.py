"""Optional packages and the user's own code, imported by name."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.errors import MissingExtra, UserError

_OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def require(package: str, *, needed_for: str, extra: str = "hf") -> None:
    """Raise ``MissingExtra`` when a package of an ``extra`` is not installed."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtra({"PIL": "pillow"}.get(package, package), extra, needed_for) from error


def is_callable_name(source: str) -> bool:
    """Is ``source`` written ``package.module:function``?"""
    return _OBJECT.fullmatch(source) is not None


def import_callable(source: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; the working directory is searched too.

    Raises:
        UserError: no such module, no such name in it, or not a function.
    """
    module_name, _, name = source.partition(":")
    module = _import_module(source, module_name)
    if name not in vars(module):
        raise UserError(f"'{source}': the module '{module_name}' ({module.__file__}) has no '{name}'")
    function: Callable[..., Any] = vars(module)[name]
    if not callable(function):
        raise UserError(
            f"'{source}': '{name}' is a {type(function).__name__}, and a function without arguments is needed"
        )
    return function


def _import_module(source: str, module_name: str) -> Any:
    here = str(Path.cwd())
    is_new = here not in sys.path
    if is_new:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"'{source}': importing '{module_name}' failed: {error}") from error
        raise UserError(
            f"'{source}': there is no module '{module_name}'; it was looked for in {here} and among installed packages"
        ) from error
    finally:
        if is_new:
            sys.path.remove(here)
