#!/usr/bin/env bash
# Everything an NVIDIA GPU can prove of this project, the most valuable first, within a few minutes: scripts/gpu.sh
# --minutes 8. In an archive that --pack has made, what the machine lacks lies beside it: nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d packages ]; then
    python=${PYTHON:-python3}
    export PYTHONPATH=$PWD:$PWD/packages
else
    source scripts/environment.sh
    python=.venv/bin/python
fi
exec "$python" -m tests.on_gpu "$@"
