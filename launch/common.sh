# Shared by quickstart.sh and test.sh: the Python environment. Sourced by a POSIX shell, working in the repository root.

heading() {
    printf '\n== %s ==\n' "$1"
}

die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
    exit 2
}

# Prints a Python's version; fails unless it is 3.11 or 3.12. A name on the PATH may be a shim that runs nothing, so
# only asking it tells.
supported() {
    "$1" -c 'import platform, sys
print(platform.python_version())
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null
}

# find_python NAME...: sets $python to the first that is supported.
find_python() {
    tried=""
    for name in "$@"; do
        if version="$(supported "$name")"; then
            python="$name"
            return
        fi
        tried="$tried $name (${version:-not found}),"
    done
    die "Python 3.11 or 3.12 is needed; tried:${tried%,}. Install one, for example the packages python3.12 and python3.12-venv"
}

make_environment() {
    if [ "$use_venv" = 0 ]; then
        find_python python python3 python3.12 python3.11
        return
    fi
    if ! { supported .venv/bin/python && .venv/bin/python -c 'import pip'; } >/dev/null 2>&1; then
        find_python python3 python3.12 python3.11
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$python cannot make virtual environments: install its venv package (on Debian $(basename "$python")-venv), or give --no-venv"
        heading "making .venv with $python ($version)"
        "$python" -m venv --clear .venv
    fi
    python="$PWD/.venv/bin/python"
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}

# The project, editable, with the versions of constraints.txt; nothing to do where the environment's stamp says that it
# was done from the same files.
install() {
    stamp="$("$python" -c '
import hashlib, pathlib, sys
digest = hashlib.sha256("\0".join([sys.version, str(pathlib.Path.cwd())]).encode())
for name in ("setup.py", "pyproject.toml", "constraints.txt", "megapt/doctor.py"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())')"
    stamped="$("$python" -c 'import sys; print(sys.prefix)')/.megapt-installed"
    if [ "$stamp" = "$(cat "$stamped" 2>/dev/null)" ]; then
        return
    fi
    heading "installing (some minutes the first time)"
    # torch first and by itself: pip then takes the build that its own configuration offers for this machine, and
    # nothing that follows asks for another.
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
    # An outside reader of our data files. It asks for much that reading files does not need; its tests are skipped
    # where it cannot be had.
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps megatron-core ||
        heading "without megatron-core: tests against it will be skipped"
    echo "$stamp" >"$stamped"
}
