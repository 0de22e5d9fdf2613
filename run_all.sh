#!/usr/bin/env bash
# Makes the environment if needed and regenerates every figure and table. ./run_all.sh --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/make_env.sh"
exec "$PYTHON" -m lib "$@"
