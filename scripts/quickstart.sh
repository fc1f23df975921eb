#!/usr/bin/env bash
# Set up, build the default model's bundle, and ask it about a picture.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

.venv/bin/python export/build.py --fp16
.venv/bin/python -m runtime build/default-fp16 examples/poster.png \
    "what numbers are in the red star and the cyan circle?" --show build/selection.png

echo
echo "Ask it yourself, and see where it looks: .venv/bin/python -m runtime.serve build/default-fp16"
