"""docs/huggingface.md runs as it stands: its blocks in order, in one folder, without a network."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end import runs

PAGE = runs.ROOT / "docs" / "huggingface.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MISSING = [name for name in ("peft", "lm_eval", "accelerate") if importlib.util.find_spec(name) is None]

# One interpreter for all blocks, as a reader has it open. A command is a process of its own, forked from it, because
# importing torch once for each of them would cost most of the time.
DRIVER = """
import json, os, sys, time
import torch, transformers
import megapt.cli

def command(words):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.argv = words
            megapt.cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"{words} ended with {status}"

scope = {"__name__": "__main__"}
for line, code in json.load(open(sys.argv[1])):
    began = time.perf_counter()
    print(f"--- line {line}", flush=True)
    if isinstance(code, str):
        exec(compile(chr(10) * line + code, "huggingface.md", "exec"), scope)
    else:
        for words in code:
            command(words)
    print(f"--- {time.perf_counter() - began:.1f} s", flush=True)
print("THE END")
"""


def blocks() -> list[tuple[int, str | list[list[str]]]]:
    """The line and the content of each block of the page: Python, or the words of each command."""
    text = PAGE.read_text()
    found: list[tuple[int, str | list[list[str]]]] = []
    for match in BLOCK.finditer(text):
        line, code = text.count("\n", 0, match.start()) + 1, match[2]
        if match[1] == "sh":
            commands = code.replace("\\\n", " ").splitlines()
            assert all(re.fullmatch(r"megapt [\w\s=.,/-]+", one) for one in commands), f"line {line} needs a shell"
            found.append((line, [shlex.split(one) for one in commands]))
        else:
            found.append((line, code))
    return found


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[test,compat]')")
def test_the_page_runs(tmp_path: Path) -> None:
    found = blocks()
    assert len(found) >= 10 and len({type(code) for _, code in found}) == 2
    listed, work = tmp_path / "blocks.json", tmp_path / "work"
    listed.write_text(json.dumps(found))
    work.mkdir()
    process = runs.start(
        sys.executable, "-c", DRIVER, listed, cwd=work, PYTHONPATH=f"{runs.ROOT}:{runs.ROOT / 'kernels'}",
        HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=270)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    print(output)
    assert process.returncode == 0 and output.endswith("THE END\n"), f"{output}\n{errors}"
