#!/usr/bin/env bash
# Set up, then lint and run every test this machine can run; its last lines name the slowest tests, and what was skipped
# and why. Arguments go to pytest: scripts/test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy --python-version 3.10 engines runtime plugins &  # what a Jetson with JetPack 6 runs
.venv/bin/mypy
wait $!
.venv/bin/python -m pytest -n auto --durations=20 "$@"
