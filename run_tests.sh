#!/usr/bin/env bash
# Makes the environment if needed and passes the tests: lint, format, stripped notebooks, pytest.
# Arguments go to pytest, as in ./run_tests.sh -k emojis
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./make_env.sh
export HF_HUB_OFFLINE=1   # no test needs the network
export OMP_NUM_THREADS=1 # two processes with two threads each would wait for one another
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
