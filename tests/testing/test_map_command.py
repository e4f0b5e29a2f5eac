"""The command that checks a map, and the pytest plugin."""

import pytest

from flowdiffrax.testing.__main__ import main
from flowdiffrax.testing._command import budget

pytest_plugins = "pytester"

MAPS = """
import numpy as np

def decay(s, t, x):
    return x * np.exp(-(t - s))

def straight(s, t, x):
    return x * (1 - (t - s))

class Fields:
    right = staticmethod(lambda t, x: -x)
    wrong = staticmethod(lambda t, x: x)
"""
FEW = ["--state", "2", "--num-points", "32", "--identities", "semigroup", "tangent"]


@pytest.fixture
def maps(tmp_path):
    path = tmp_path / "maps.py"
    path.write_text(MAPS)
    return str(path)


def test_exit_status_and_what_is_printed(maps, capsys):
    assert main([f"{maps}:decay", "--field", f"{maps}:Fields.right", *FEW]) == 0
    assert "semigroup" in capsys.readouterr().out
    assert main([f"{maps}:decay", "--field", f"{maps}:Fields.wrong", *FEW]) == 1
    failed = capsys.readouterr().err
    assert "`tangent` does not hold" in failed and "`semigroup`" not in failed
    line = [f"{maps}:straight", *FEW]
    assert main(line) == 1
    assert main([*line, "--budget", "100"]) == 0
    assert main([*line, "--budget", "semigroup=100"]) == 0
    assert main([*line, "--budget", "tangent=100"]) == 1


def test_where_it_looks(maps, capsys):
    line = [f"{maps}:decay", "--bounds", "5", "6", "--times", "2", "3", "--ordered"]
    assert main([*line, *FEW, "--seed", "3"]) == 0
    assert "rising times in [2.0, 3.0] and states with entries in [5.0, 6.0]" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["{maps}:decay"], "Give the shape of a state"),
        (["{maps}:decay", "--state", "two"], "must be like 2 or 28,28,1; got 'two'"),
        (["{maps}:none", "--state", "2"], "has no 'none'"),
        (["{maps}", "--state", "2"], "must be `module:name` or `file.py:name`"),
        (["away.py:decay", "--state", "2"], "away.py is not there"),
        (["no_such_module:decay", "--state", "2"], "no_such_module"),
        (["away.safetensors"], "no checkpoint at away.safetensors"),
        (["{maps}:decay", "--state", "2", "--budget", "all"], "one number, such as 0.01"),
        (["{maps}:decay", "--state", "2", "--budget", "semi=1"], "names among"),
    ],
)
def test_mistakes_have_a_cure(maps, capsys, words, message):
    with pytest.raises(SystemExit) as found:
        main([word.format(maps=maps) for word in words])
    assert found.value.code == 2
    assert message in capsys.readouterr().err


def test_budgets():
    assert budget([]) is None and budget(["0.01"]) == 0.01
    assert budget(["semigroup=0.1", "tangent=2"]) == {"semigroup": 0.1, "tangent": 2.0}


def test_each_map_is_a_test(pytester):
    pytester.makepyfile(maps=MAPS)
    pytester.makeini("[pytest]\nflow_maps =\n  maps.py:decay " + " ".join(FEW))
    plugin = "-p", "flowdiffrax.testing.plugin", "-p", "no:cacheprovider"
    pytester.runpytest_inprocess(*plugin).assert_outcomes(passed=1)
    line = "maps.py:straight " + " ".join(FEW)
    result = pytester.runpytest_inprocess(*plugin, "--flow-map", line)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*`semigroup` does not hold*"])
    assert "_command.py" not in result.stdout.str()
    result = pytester.runpytest_inprocess(*plugin, "--flow-map", "maps.py:decay --what")
    result.stdout.fnmatch_lines(["*unrecognized arguments: --what*"])
