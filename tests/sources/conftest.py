from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sources import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model by the name of its builder, built once."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = vars(tiny)[name](tmp_path_factory.mktemp(name))
        return made[name]

    return directory
