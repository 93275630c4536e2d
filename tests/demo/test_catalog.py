import subprocess
import sys

import pytest

from octavo.demo import MODEL_DIR, MODEL_NAMES, model_path
from octavo.errors import UserError


def test_the_clip_model_is_there():
    assert model_path("clip") == MODEL_DIR
    assert (MODEL_DIR / "config.json").is_file()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no demo model 'clap'; choose one of: clip, llama"):
        model_path("clap")
    assert all(model_path(name).is_dir() for name in MODEL_NAMES)


def test_names_and_data_need_no_torch():
    program = "import sys, octavo.demo, octavo.demo.tasks; print({'torch', 'transformers', 'PIL'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
