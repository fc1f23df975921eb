#!/usr/bin/env bash
# Set up, build the default model's bundle, and ask it about a picture.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

[ -d checkpoints/default ] || .venv/bin/python tests/bench/random_checkpoint.py --shape small --out checkpoints/default
.venv/bin/python export/build.py --fp16
.venv/bin/python -m runtime build/default-fp16 tests/parity/data/images/landscape.png \
    "What does the sign say?" --max-new-tokens 11 --show build/selection.png
