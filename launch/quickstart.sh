#!/bin/sh
# From a fresh clone to a trained model: makes .venv, installs megapt, then runs `megapt quickstart`.
#   bash launch/quickstart.sh [--no-venv] [--install-only] [--workdir FOLDER] [--text FILE] ...
# --no-venv: install into the Python on the PATH; --install-only: stop after installing.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/launch/common.sh"
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

# Relative paths in the arguments are the caller's, so only the installation works in the repository.
caller="$PWD"
cd "$root"
make_environment
install
cd "$caller"
[ "$install_only" = 1 ] || exec "$python" -m megapt quickstart "$@"
