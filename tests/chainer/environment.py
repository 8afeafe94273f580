"""Chainer's own virtual environment, `.venv-chainer`: made once, then reused. `python -m tests.chainer.environment`

Chainer ended in 2022. Its last release runs on Python 3.11 with a numpy, a setuptools and an h5py of that time, which have
no place beside the project's own packages.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-chainer"
PYTHON = FOLDER / "bin/python"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CHAINER = "chainer==7.8.1"


class EnvironmentUnavailable(Exception):
    """Chainer cannot be installed on this machine. The message says why."""


def chainer_python() -> Path:
    """The interpreter that has Chainer, after the installation when that has not been done yet.

    Raises EnvironmentUnavailable.
    """
    stamp = FOLDER / ".installed"
    with open(REQUIREMENTS) as requirements:
        fcntl.flock(requirements, fcntl.LOCK_EX)  # two test runs in one checkout
        wanted = f"{requirements.read()}{CHAINER}\n"
        if not stamp.is_file() or stamp.read_text() != wanted:
            shutil.rmtree(FOLDER, ignore_errors=True)
            _install()
            stamp.write_text(wanted)
    return PYTHON


def run(*arguments: str) -> None:
    """`python ARGUMENTS` in Chainer's environment and the project's root. Raises EnvironmentUnavailable, CalledProcessError."""
    # Nothing of the project's own environment is found there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([chainer_python(), "-W", "ignore", *arguments], cwd=ROOT, env=environment, check=True)


def _install() -> None:
    python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if python is None:
        raise EnvironmentUnavailable("Chainer's numpy needs Python 3.11: install python3.11 beside the one that runs the tests")
    pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [python, "-m", "venv", "--without-pip", str(FOLDER)],
        [*pip, "--requirement", str(REQUIREMENTS)],
        # Only a source distribution exists; its build must use the setuptools that was just installed.
        [*pip, "--no-build-isolation", "--no-deps", CHAINER],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EnvironmentUnavailable(f"{' '.join(command)} failed: {done.stderr[-1500:]}")


if __name__ == "__main__":
    print(chainer_python())
