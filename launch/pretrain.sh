#!/bin/sh
# Trains the model that a config file describes, from any launcher; this file is both a shell script and a Python program.
#   deepspeed launch/pretrain.sh --config configs/quickstart.yaml [key=value ...]
#   torchrun --nproc-per-node 8 launch/pretrain.sh --config ...      srun launch/pretrain.sh --config ...
#   bash launch/pretrain.sh --config ... [--ranks N]                  starts the ranks of this machine by itself
""":"
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
python=python3
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/../.venv/bin/python" ]; then
    python="$here/../.venv/bin/python"
fi
exec "$python" -u "$here/$(basename "$0")" "$@"
":"""

import os
import sys


def main() -> int:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:0] = [root, os.path.join(root, "kernels")]
    from megapt.cli import pretrain_script

    return pretrain_script(os.path.abspath(__file__), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
