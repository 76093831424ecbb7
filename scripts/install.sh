#!/usr/bin/env bash
# Creates a virtual environment where there is none and installs into it: install.sh FOLDER ARGUMENTS...
# The arguments are those of `pip install`. uv does the work (it is many times faster) with pip's own settings; where uv
# cannot be had, pip does. PYTHON names the interpreter; otherwise the first supported one on the PATH is taken.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$1
shift

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 1
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "Could not create $venv. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi

if [ ! -x "$venv/bin/uv" ]; then
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --constraint "$here/../constraints.txt" uv ||
        echo "uv is not to be had here; installing with pip, which takes longer" >&2
fi

if [ -x "$venv/bin/uv" ]; then
    settings=$("$venv/bin/python" "$here/pip_settings.py")
    eval "$settings"
    exec "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"
fi
exec "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
