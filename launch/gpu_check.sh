#!/bin/sh
# What this repository does on a machine's GPU, in 9 minutes at most: kernel tests, microbenchmarks of all kernels,
# training with and without each of them, the quickstart. Installs nothing, needs no network and no root.
#   bash launch/gpu_check.sh FOLDER [--parts environment,tests,kernels,training,quickstart] [--seconds N] [--cpu]
# FOLDER gets summary.md, summary.json, bench.jsonl, pictures and log.txt, each part's as soon as it is done.
# --cpu: a rehearsal on a machine without a GPU, the same parts with tiny shapes. PYTHON names another Python.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/launch/common.sh"
if [ -n "${PYTHON:-}" ]; then
    find_python "$PYTHON"
elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    find_python "$root/.venv/bin/python"
else
    find_python python3 python python3.12 python3.11
fi
PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" -P -m megapt.gpu_check "$@"
