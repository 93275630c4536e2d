"""Which demo models there are and where they lie."""

from pathlib import Path

from octavo.errors import UserError

MODEL_NAMES = ("clip", "llama")
MODEL_DIR = Path(__file__).parent / "clip"


def model_path(name: str) -> Path:
    """Directory of the demo model ``name``, in the layout of Hugging Face.

    >>> model_path("clip").name
    'clip'
    """
    if name not in MODEL_NAMES:
        raise UserError(f"there is no demo model {name!r}; choose one of: {', '.join(MODEL_NAMES)}")
    return Path(__file__).parent / name
