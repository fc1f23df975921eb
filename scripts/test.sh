#!/usr/bin/env bash
# Set up, then lint and run every test this machine can run. Arguments go to pytest: scripts/test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n auto "$@"
