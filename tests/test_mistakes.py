"""What a newcomer is most likely to get wrong, and the cure that each message names."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from mistakes import MISTAKES


@pytest.fixture(scope="module")
def outcomes():
    script = pathlib.Path(__file__).with_name("mistakes.py")
    # All that it does is compilation.
    fast = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=fast
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_the_cure(name, outcomes):
    _, error, words = MISTAKES[name]
    classes, message = outcomes[name]
    assert error.__name__ in classes, message
    assert words in message
