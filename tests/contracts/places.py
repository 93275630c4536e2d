"""Which backends are tested, and where each of them works.

Triton's kernels run on a GPU; without one, on a CPU by its interpreter where it is installed: ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os

import pytest
import torch

from octavo.backends.base import Backend
from octavo.backends.gpu import GpuBackend
from octavo.backends.simulate import BACKENDS

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = list(BITS)
TESTED: list[Backend] = list(BACKENDS)
if os.environ.get("TRITON_INTERPRET") == "1":
    TESTED = [GpuBackend("cpu")]
    DTYPES.remove(torch.bfloat16)  # the interpreter cuts it off instead of rounding

every_backend = pytest.mark.parametrize("backend", TESTED, ids=lambda backend: backend.name)


def place(backend: Backend) -> str:
    """The device of its tensors."""
    is_for_gpus = isinstance(backend, GpuBackend) and backend.device_type == "cuda"
    if is_for_gpus and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda" if is_for_gpus else "cpu"
