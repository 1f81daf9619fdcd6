"""quickstart.sh and test.sh, in an environment whose pip, ruff, mypy and pytest only note their calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("pip", "ruff", "mypy", "pytest", "megapt")

RECORD = """
import os, sys
name = os.path.basename(os.path.dirname(__file__))
with open(os.environ["CALLS"], "a") as calls:
    print(name, *sys.argv[1:], file=calls)
print(f"output of {name} in {os.getcwd()}", flush=True)
sys.exit(name in os.environ.get("FAILING", "").split())
"""


class Tree:
    """A copy of the scripts beside an environment of recording modules."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls_file = root, root / "calls"
        shutil.copytree(ROOT / "launch", root / "launch")
        (root / "megapt").mkdir()
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "megapt/doctor.py"):
            shutil.copy(ROOT / name, root / name)
        venv.create(root / ".venv", with_pip=False, symlinks=True)
        self.packages = next((root / ".venv" / "lib").glob("python*")) / "site-packages"
        for name in MODULES:
            (self.packages / name).mkdir()
            (self.packages / name / "__init__.py").touch()
            (self.packages / name / "__main__.py").write_text(RECORD)

    def run(
        self, script: str, *arguments: str, status: int = 0, cwd: Path | None = None, failing: str = ""
    ) -> str:
        """The script's output, stdout and stderr together."""
        environ = {**os.environ, "CALLS": str(self.calls_file), "FAILING": failing}
        ran = subprocess.run(
            ["sh", str(self.root / "launch" / script), *arguments],
            cwd=cwd or self.root,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        assert ran.returncode == status, ran.stdout
        return ran.stdout

    def calls(self) -> list[str]:
        """What was called since the last look."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        return lines


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("a tree") / "clone")


@pytest.fixture(scope="module")
def installed(tree: Tree) -> Tree:
    tree.run("quickstart.sh", "--install-only")
    tree.calls()
    (tree.packages / "lm_eval").mkdir(exist_ok=True)
    return tree


def test_installs_torch_first_and_only_when_something_changed(tree: Tree) -> None:
    tree.run("quickstart.sh", "--install-only")
    first, second, third = tree.calls()
    assert first.startswith("pip install") and first.endswith("-c constraints.txt torch")
    assert second.startswith("pip install") and second.endswith("-c constraints.txt -e .[test]")
    assert third.startswith("pip install") and third.endswith("-c constraints.txt --no-deps megatron-core")
    tree.run("quickstart.sh", "--install-only")
    assert tree.calls() == []
    tree.run("test.sh", "--install-only")  # what tests alone need
    (fourth,) = tree.calls()
    assert fourth.startswith("pip install") and fourth.endswith("-c constraints.txt -e .[compat]")
    (tree.packages / "lm_eval").mkdir()
    tree.run("test.sh", "--install-only")
    assert tree.calls() == []
    with (tree.root / "constraints.txt").open("a") as constraints:
        constraints.write("another==1\n")
    tree.run("test.sh", "--install-only")
    assert len(tree.calls()) == 3


def test_a_failed_installation_stops_and_is_not_remembered(installed: Tree) -> None:
    with (installed.root / "constraints.txt").open("a") as constraints:
        constraints.write("one-more==1\n")
    installed.run("quickstart.sh", status=1, failing="pip")
    assert len(installed.calls()) == 1
    installed.run("quickstart.sh", "--install-only")
    assert len(installed.calls()) == 3


def test_quickstart_passes_its_arguments_and_the_callers_folder(installed: Tree, tmp_path: Path) -> None:
    output = installed.run("quickstart.sh", "--workdir", "out here", "--text", "t.txt", cwd=tmp_path)
    assert installed.calls() == ["megapt quickstart --workdir out here --text t.txt"]
    assert f"output of megapt in {tmp_path}" in output
    installed.run("quickstart.sh", status=1, failing="megapt")


def test_test_runs_every_check_and_ends_with_pytest(installed: Tree) -> None:
    installed.calls()
    output = installed.run("test.sh", "-k", "a or b", "-x")
    assert installed.calls() == ["ruff check .", "mypy", "pytest -k a or b -x"]
    assert output.splitlines()[-1] == f"output of pytest in {installed.root}"
    assert [line for line in output.splitlines() if "==" in line] == [
        "== ruff ==",
        "== mypy ==",
        "== pytest ==",
    ]


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest", "ruff pytest"])
def test_test_fails_when_any_check_fails_after_running_all(installed: Tree, failing: str) -> None:
    installed.calls()
    output = installed.run("test.sh", status=1, failing=failing)
    assert len(installed.calls()) == 3
    assert output.splitlines()[-1] == f"failed: {failing}"


def _find_python(path: Path, *names: str) -> subprocess.CompletedProcess[str]:
    code = '. "$0"; find_python "$@"; echo "$python $version"'
    return subprocess.run(
        ["/bin/sh", "-c", code, str(ROOT / "launch" / "common.sh"), *names],
        env={"PATH": f"{path}:/usr/bin:/bin"},
        text=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def pythons(tmp_path: Path) -> Path:
    """A folder for the PATH: a shim that runs nothing, a Python that is too old, and this one."""
    bodies = {
        "shim": "echo 'not installed' >&2; exit 127",
        "old": "echo 3.9.1; exit 1",
        "good": f'exec "{sys.executable}" "$@"',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_the_first_python_that_runs_and_fits_is_taken(pythons: Path) -> None:
    ran = _find_python(pythons, "nowhere", "shim", "old", "good")
    assert ran.stdout.split() == ["good", ".".join(map(str, sys.version_info[:3]))]


def test_what_is_missing_is_said(pythons: Path) -> None:
    ran = _find_python(pythons, "nowhere", "shim", "old")
    assert ran.returncode == 2
    assert "3.11 or 3.12 is needed; tried: nowhere (not found), shim (not found), old (3.9.1)." in ran.stderr
