"""The compiled loops are ready before anything is compared with them."""

from __future__ import annotations

import pytest

from octavo.backends.native import LIBRARY


@pytest.fixture(scope="session", autouse=True)
def compiled_loops() -> bool:
    """Whether this machine could compile them."""
    return LIBRARY.wait()
