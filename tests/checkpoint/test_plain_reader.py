"""The reader for numpy alone, as a stranger would use it: one copied file, no torch, no megapt."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megapt.checkpoint import plain
from megapt.model.table import parameter_table
from tests.checkpoint.fakes import KINDS, meta_of, true_value
from tests.checkpoint.handmade import SMALL, change, weights, write

STRANGER = """
import sys
sys.modules.update(dict.fromkeys(("torch", "megapt", "safetensors")))  # importing any of them fails
import numpy as np
from plain import Checkpoint

checkpoint = Checkpoint(sys.argv[1])
np.savez(sys.argv[2], **{f"{kind}/{name}": checkpoint.read(name, kind)
                         for kind in ("weight", "exp_avg", "exp_avg_sq") for name in checkpoint.names(kind)})
print(checkpoint.step, checkpoint.meta["config"]["model"]["hidden"])
"""


def test_one_copied_file_reads_everything(tmp_path: Path) -> None:
    shapes = {name: spec.shape for name, spec in parameter_table(SMALL).items()}
    tensors = {(name, kind): true_value(name, kind, shape) for name, shape in shapes.items() for kind in KINDS}
    tensors["norm.weight", "exp_avg"] = tensors["norm.weight", "exp_avg"].double()
    tensors["norm.weight", "exp_avg_sq"] = tensors["norm.weight", "exp_avg_sq"].bfloat16()
    tensors["head.weight", "exp_avg"] = tensors["head.weight", "exp_avg"].half()
    path = write(tmp_path / "c", tensors, meta_of(SMALL), parts=3)
    (tmp_path / "alone").mkdir()
    shutil.copy(plain.__file__, tmp_path / "alone")
    command = [sys.executable, "-c", STRANGER, str(path), str(tmp_path / "out.npz")]
    done = subprocess.run(command, cwd=tmp_path / "alone", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"1 {SMALL.hidden}\n"), done.stderr
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == {f"{kind}/{name}" for name, kind in tensors}
        for (name, kind), tensor in tensors.items():
            array = found[f"{kind}/{name}"]
            stored = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            assert array.tobytes() == stored.numpy().tobytes() and array.shape == tuple(tensor.shape)
    bits = (plain.Checkpoint(path).read("norm.weight", "exp_avg_sq").view("u4") >> 16).astype("u2")
    assert np.array_equal(bits.view("i2"), tensors["norm.weight", "exp_avg_sq"].view(torch.int16).numpy())


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = weights(tmp_path / "c")
    file = path / "rank-00001-000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(plain.Damaged, match="rank-00001-000.safetensors, weight of head.weight: its checksum is crc32"):
        plain.Checkpoint(path).read("head.weight")
    plain.Checkpoint(path).read("norm.weight")
    with pytest.raises(plain.Damaged, match="weight of nothing"):
        plain.Checkpoint(path).read("nothing")
    change(path, lambda tree: tree["tensors"]["norm.weight"]["kinds"]["weight"]["slices"].pop())
    with pytest.raises(plain.Damaged, match="weight of norm.weight: its slices do not cover"):
        plain.Checkpoint(path).read("norm.weight")
    change(path, lambda tree: tree.update(version=2))
    with pytest.raises(plain.Damaged, match="megapt-checkpoint', 2.*reads megapt-checkpoint, 1"):
        plain.Checkpoint(path)
    (path / "COMMITTED").unlink()
    with pytest.raises(plain.Damaged, match="'COMMITTED' is not a file in it"):
        plain.Checkpoint(path)
