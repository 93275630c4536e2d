"""The text of the demo language model: the Python standard library's own sources.

Training reads the library of the Python that runs it, and writes what was held out beside the model, so that
perplexity means the same everywhere.
"""

import hashlib
import sysconfig
from pathlib import Path

_NOT_PROSE = ("encodings", "idlelib/idle_test", "lib2to3/tests/data", "site-packages", "pydoc_data", "turtledemo")
_ONE_IN = 40
_HELD_OUT_BYTES = 300_000
_LARGEST_FILE = 400_000


def library() -> Path:
    """Where the running Python keeps the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def modules(root: Path) -> list[Path]:
    """Source files below ``root``, as paths relative to it, in alphabetical order: code and prose, no tables."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path
        for path in found
        if not path.as_posix().startswith(_NOT_PROSE) and 0 < (root / path).stat().st_size < _LARGEST_FILE
    )


def is_test(path: Path) -> bool:
    """Whether a module tests another."""
    return bool({"test", "tests"} & set(path.parts))


def is_held_out(path: Path) -> bool:
    """One module in forty, chosen by its name, together with the module that tests it.

    >>> is_held_out(Path("statistics.py")) == is_held_out(Path("test/test_statistics.py"))
    True
    """
    stem = path.stem.removeprefix("test_")
    return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:4], "big") % _ONE_IN == 0


def training_texts(root: Path) -> tuple[list[str], list[str]]:
    """Sources to learn from: the library itself, and its tests."""
    chosen = [path for path in modules(root) if not is_held_out(path)]
    return (
        [_read(root / path) for path in chosen if not is_test(path)],
        [_read(root / path) for path in chosen if is_test(path)],
    )


def held_out_text(root: Path) -> str:
    """Modules that training never sees, smallest first, up to about 300 kB."""
    chosen = [path for path in modules(root) if is_held_out(path) and not is_test(path)]
    texts, size = [], 0
    for path in sorted(chosen, key=lambda path: ((root / path).stat().st_size, path)):
        text = _read(root / path)
        size += len(text.encode())
        if size > _HELD_OUT_BYTES:
            break
        texts.append(text)
    return "\n".join(texts)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
