"""Type checkers and `help` read the public functions as a user does."""

import importlib.util
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jax_sce

ROOT = Path(__file__).parents[1]
USES = "tests/uses.py"


def assert_no_error(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_mypy_knows_the_types_of_uses():
    assert_no_error(sys.executable, "-m", "mypy", USES)


# The same checker, as a wheel that downloads nothing.
PYRIGHT = shutil.which("pyright") or shutil.which("basedpyright")


@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")
def test_pyright_knows_the_types_of_uses():
    assert_no_error(PYRIGHT, "--level", "error", "--pythonpath", sys.executable, USES)


PUBLIC = {name: getattr(jax_sce, name) for name in jax_sce.__all__}


def test_help_shows_the_public_functions_in_eighty_columns():
    first_screen = inspect.getdoc(jax_sce).splitlines()
    assert len(first_screen) < 20
    for name in PUBLIC:
        assert any(name in line for line in first_screen), name
    for name, x in {"jax_sce": jax_sce, **PUBLIC}.items():
        for line in inspect.getdoc(x).splitlines():
            assert len(line) <= 80 - len("    "), f"{name}: {line}"


@pytest.mark.parametrize("name", [name for name in PUBLIC if callable(PUBLIC[name])])
def test_signatures_are_short(name):
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    for parameter in parameters:
        assert len(str(parameter)) <= 60, parameter
