#!/bin/sh
# All checks: ruff, mypy, pytest; fails if any of them fails.
#   bash launch/test.sh [--no-venv] [--install-only] [pytest arguments]
# --no-venv: install into the Python on the PATH; --install-only: stop after installing.
set -eu
cd "$(dirname "$0")/.."
. launch/common.sh
use_venv=1
install_only=0
for argument in "$@"; do
    shift
    case "$argument" in
        --no-venv) use_venv=0 ;;
        --install-only) install_only=1 ;;
        *) set -- "$@" "$argument" ;;
    esac
done
make_environment
install
# One page of the documentation hands a model to lm-eval, which brings much that nothing else needs.
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)' ||
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compat]' ||
    heading "without lm-eval: docs/huggingface.md will not be tested"
[ "$install_only" = 0 ] || exit 0

# One thread per process, since tests start many; no downloads and no windows.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg
failed=""
heading "ruff"
"$python" -m ruff check . || failed="$failed ruff"
heading "mypy"
"$python" -m mypy || failed="$failed mypy"
heading "pytest"
"$python" -m pytest "$@" || failed="$failed pytest"
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
