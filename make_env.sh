# Sourced by run_all.sh and run_tests.sh: makes .venv when requirements.txt changed, and sets $PYTHON.
# In the conda environment of environment.yml that environment is used as it is.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ "${CONDA_DEFAULT_ENV:-}" = from-text-to-emoji ]; then
    PYTHON=python
    return 0
fi
PYTHON="$repo/.venv/bin/python"
lock=$(cksum <"$repo/requirements.txt")
if [ "$(cat "$repo/.venv/made-from" 2>/dev/null || true)" = "$lock $repo" ] && [ -x "$PYTHON" ]; then
    return 0
fi

base=""
for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$name
        break
    fi
done
if [ -z "$base" ]; then
    echo "Error: Python 3.11 or newer (with venv) was not found; install it and run this again" >&2
    exit 2
fi
echo "Making .venv from requirements.txt (once; two to ten minutes, about 3 GB)"
rm -rf "$repo/.venv"
"$base" -m venv "$repo/.venv"
log="$repo/.venv/pip.log"
# setuptools first: lime comes as a source package and is built with it
if ! { "$PYTHON" -m pip install -q --disable-pip-version-check $(grep -E '^(setuptools|wheel)==' "$repo/requirements.txt") &&
    "$PYTHON" -m pip install -q --disable-pip-version-check -r "$repo/requirements.txt" &&
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e "$repo"; } >"$log" 2>&1; then
    grep -E '^ERROR' "$log" | head -5 >&2 || true
    echo "Error: the packages of requirements.txt could not be installed; the whole report is in .venv/pip.log" >&2
    exit 2
fi
echo "$lock $repo" >"$repo/.venv/made-from" # last, so that a half-made .venv is made again
