"""Methods with some of their call expressions redirected.

Observation tells at which call expressions of which function tensors meet. The function is compiled again from its
own source with just these expressions changed, ``callee(a, b)`` to ``redirect(self, callee, a, b)``, and put into a
subclass. Nothing is active at run time but plain functions, so ``torch.compile``, ``torch.export``,
threads and deepcopy see nothing unusual. Line numbers, globals, defaults, closures and decorators stay.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

from octavo.nn.expressions import Position, Redirect, Redirector

OWNER = "octavo_owner__"
_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
"""Flags of ``from __future__`` imports, which change what nested definitions mean."""


class NoSourceError(Exception):
    """A function cannot be compiled again; the text says why."""


@functools.lru_cache(maxsize=256)
def definition(code: CodeType) -> ast.FunctionDef:
    """The tree of the function that ``code`` is of, with the lines and columns of its file (or notebook cell).

    Raises:
        NoSourceError: it is not there.
    """
    first = code.co_firstlineno
    lines = linecache.getlines(code.co_filename)[first - 1 :]
    if not lines:
        raise NoSourceError(f"the source {code.co_filename} cannot be read")
    try:
        block = inspect.getblock(lines)
        is_indented = block[0][:1].isspace()  # then it needs something around it, and its columns stay
        tree = ast.parse("if 1:\n" * is_indented + "".join(block), code.co_filename)
    except SyntaxError as error:
        raise NoSourceError(f"the source {code.co_filename} cannot be read: {error.msg}") from error
    ast.increment_lineno(tree, first - 1 - is_indented)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            return node
    raise NoSourceError(f"no definition of {code.co_name} at {code.co_filename}:{first}")


@dataclass(frozen=True, slots=True)
class Redirected:
    """A function's code with the calls at some positions redirected; ``made_from`` makes it a function again.

    Args:
        code: The code that was observed.
        new_code: The same, redirected.
        cells: Name of a free variable of ``new_code`` -> what is called there.
    """

    code: CodeType
    new_code: CodeType
    cells: Mapping[str, CellType]

    def made_from(self, function: FunctionType) -> FunctionType:
        """``function``, whose code this is of, redirected: globals, defaults and closure are its own."""
        assert function.__code__ is self.code
        cells = {**dict(zip(self.code.co_freevars, function.__closure__ or (), strict=True)), **self.cells}
        closure = tuple(cells[name] for name in self.new_code.co_freevars)
        clone = FunctionType(self.new_code, function.__globals__, function.__name__, function.__defaults__, closure)
        clone.__kwdefaults__ = function.__kwdefaults__
        clone.__qualname__ = function.__qualname__
        clone.__dict__.update(function.__dict__)
        return clone


def redirected(
    code: CodeType, redirects: Mapping[Position, tuple[str, Redirect]], *, takes_owner: bool, cls: type
) -> Redirected:
    """``code`` with the calls at some positions redirected; calls in functions defined inside count as its own.

    Args:
        code: Of a plain function (a method as its class holds it).
        redirects: Position -> the tensor method that is called there (empty for none), and what is called instead.
        takes_owner: True adds a parameter, the keyword ``OWNER``, that is handed to the redirects; False hands them the
            function's own first parameter (``self``).
        cls: The class for which it is done.

    Raises:
        NoSourceError: the source is not there, or is not what was executed.
    """
    tree = copy.deepcopy(definition(code))
    names = {
        position: (f"octavo_redirect_{k}__", method) for k, (position, (method, _)) in enumerate(redirects.items())
    }
    owner = OWNER if takes_owner else code.co_varnames[0]
    first = code.co_varnames[0] if code.co_argcount else ""
    transformer = Redirector(owner, names, first, functools.partial(_inherited, cls, code))
    tree.body = [transformer.visit(statement) for statement in tree.body]
    if transformer.found != set(redirects):
        raise NoSourceError(f"the source of {code.co_name} is not the code that ran ({code.co_filename})")
    _make_bare(tree, takes_owner=takes_owner)
    cells = {names[position][0]: CellType(call) for position, (_, call) in redirects.items()}
    cells |= {name: CellType(callee) for name, callee in transformer.needed.items()}
    return Redirected(code, _compile_inside_factory(tree, code, tuple(cells)), cells)


def _inherited(cls: type, code: CodeType, name: str) -> FunctionType | None:
    """What ``super().name`` is in the method of ``cls`` with this code."""
    mro = cls.__mro__
    home = next((k for k, base in enumerate(mro) if any(_has_code(f, code) for f in vars(base).values())), len(mro))
    found = next((vars(base)[name] for base in mro[home + 1 :] if name in vars(base)), None)
    return found if isinstance(found, FunctionType) else None


def _has_code(attribute: Any, code: CodeType) -> bool:
    return isinstance(attribute, FunctionType) and any(f.__code__ is code for f in _layers(attribute))


def _make_bare(tree: ast.FunctionDef, *, takes_owner: bool) -> None:
    """Drop what is evaluated when a function is defined: decorators and annotations; defaults stay as placeholders."""
    tree.decorator_list = []
    tree.returns = None
    arguments = tree.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.copy_location(ast.Constant(None), d) for d in arguments.defaults]
    arguments.kw_defaults = [d and ast.copy_location(ast.Constant(None), d) for d in arguments.kw_defaults]
    if takes_owner:  # behind all others: super() takes the first parameter
        arguments.kwonlyargs.append(ast.arg(OWNER))
        arguments.kw_defaults.append(None)


def _compile_inside_factory(tree: ast.FunctionDef, code: CodeType, extra: tuple[str, ...]) -> CodeType:
    """Compile ``tree`` as an inner function, so that its free variables are free variables again.

    Around a method stands a class of the same name, so that private names (``self.__x``) are what they were.
    """
    parameters = ", ".join((*code.co_freevars, *extra))
    outer = ast.parse(f"def octavo_factory__({parameters}): pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    within = (code.co_qualname.split(".")[-2:-1] or ["<locals>"])[0]
    if within == "<locals>":
        outer.body = [tree]
    else:
        shell = ast.parse(f"class {within}: pass").body[0]
        assert isinstance(shell, ast.ClassDef)
        shell.body = [tree]
        outer.body = [shell]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    flags = code.co_flags & _FUTURES
    found = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    for _ in range(2 if within == "<locals>" else 3):
        found = next(c for c in found.co_consts if isinstance(c, CodeType))
    assert found.co_name == code.co_name
    return found


def is_inside(inner: CodeType, outer: CodeType) -> bool:
    """Whether ``inner`` is of a function, lambda or comprehension that is defined inside ``outer``."""
    nested = [c for c in outer.co_consts if isinstance(c, CodeType)]
    return any(c is inner or is_inside(inner, c) for c in nested)


def method_with_code(cls: type, code: CodeType) -> tuple[str, FunctionType] | None:
    """The method of ``cls`` in which ``code`` runs, seen through decorators: name and function with that code.

    A method that a subclass overrides is not one of ``cls``: it is only reached through its overrider.
    """
    overridden: set[str] = set()
    for base in cls.__mro__:
        for name, attribute in vars(base).items():
            if isinstance(attribute, FunctionType) and name not in overridden:
                inner = next((f for f in _layers(attribute) if f.__code__ is code), None)
                if inner is not None:
                    return name, inner
        overridden.update(vars(base))
    return None


def replace_inner(function: FunctionType, old: FunctionType, new: FunctionType) -> FunctionType:
    """``function`` with ``old``, which it wraps at some depth, replaced by ``new``."""
    if function is old:
        return new
    cells = []
    for cell in function.__closure__ or ():
        content = _content(cell)
        wraps = isinstance(content, FunctionType) and any(f is old for f in _layers(content))
        cells.append(CellType(replace_inner(content, old, new)) if wraps else cell)
    clone = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    clone.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return clone


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _layers(function: FunctionType, depth: int = 8) -> Iterator[FunctionType]:
    """``function`` and the functions that it wraps."""
    yield function
    if depth:
        for cell in function.__closure__ or ():
            content = _content(cell)
            if isinstance(content, FunctionType) and content is not function:
                yield from _layers(content, depth - 1)
