"""What the set-up says on a machine that lacks something, without changing this one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOOLS = ("bash", "dirname", "sed", "head", "cat", "cksum", "df", "awk", "env", "grep")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout without .venv, and a PATH with the bare tools of a user who is not root."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    program(tools / "id", "echo 1000")
    for folder in ("scripts", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def setup(machine: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": str(machine / "bin"), "HOME": str(machine)} | environment
    return subprocess.run([machine / "checkout/scripts/setup", "serve"], env=kept, capture_output=True, text=True, check=False)


def real_python(machine: Path) -> None:
    (machine / "bin/python3.11").symlink_to(os.path.realpath("/proc/self/exe"))


def test_no_python(machine: Path) -> None:
    done = setup(machine)
    assert done.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed" in done.stderr


def test_an_old_python_that_was_asked_for(machine: Path) -> None:
    program(machine / "bin/old", 'if [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi')
    done = setup(machine, PYTHON="old")
    assert done.returncode == 1
    assert "old is Python 3.9.2" in done.stderr


def test_no_java_says_what_to_install_when_it_cannot(machine: Path) -> None:
    real_python(machine)
    done = setup(machine)
    assert done.returncode == 1
    assert "sudo apt-get install openjdk-17-jre-headless" in done.stderr


def test_an_old_java(machine: Path) -> None:
    real_python(machine)
    program(machine / "bin/java", "echo 'openjdk version \"1.8.0_392\"' >&2")
    done = setup(machine)
    assert done.returncode == 1
    assert "Java 17 is needed" in done.stderr


def test_a_full_disk(machine: Path) -> None:
    real_python(machine)
    program(machine / "bin/java", "echo 'openjdk version \"17.0.1\"' >&2")
    (machine / "bin/df").unlink()
    program(machine / "bin/df", "echo head; echo 'x 1 1 204800 1% /'")
    done = setup(machine)
    assert done.returncode == 1
    assert "200 MB are free" in done.stderr
    assert not (machine / "checkout/.venv").exists()


def test_an_unknown_option_of_serve_is_refused_before_anything_is_installed(machine: Path) -> None:
    command = [machine / "checkout/scripts/serve", "--prot", "80"]
    done = subprocess.run(command, env={"PATH": str(machine / "bin")}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown option --prot" in done.stderr


def test_the_packages_by_hash_are_those_that_are_pinned() -> None:
    def versions(name: str) -> dict[str, str]:
        lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in lines}

    locked, wanted = versions("serve.lock"), versions("serve.txt")
    assert wanted.keys() - locked.keys() == {"torch", "torchvision"}
    assert locked.items() <= (versions("constraints.txt") | versions("train.txt") | wanted).items()
    packages = re.split(r"^[\w.-]+==", (ROOT / "requirements/serve.lock").read_text(), flags=re.MULTILINE)[1:]
    assert len(packages) == len(locked)
    assert all("--hash=sha256:" in package for package in packages)
