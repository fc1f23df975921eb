#!/bin/sh
# Ask a running server (python -m runtime.serve build/default-fp16): sh examples/curl.sh [PICTURE] [QUESTION]
# A " in the question needs a \ before it: it goes into JSON as it is.
set -eu
url=${FLEX_URL:-http://127.0.0.1:8000}/v1
picture=${1:-examples/poster.png}
question=${2:-what numbers are in the red star and the cyan circle?}
key="Authorization: Bearer ${FLEX_API_KEY:-none needed}"

model=$(curl -sS -H "$key" "$url/models" | sed -n 's/.*"id": *"\([^"]*\)".*/\1/p')
image=$(base64 < "$picture" | tr -d '\n')
# A photo is too long for a command line: the body comes through standard input.
curl -sS "$url/chat/completions" -H "$key" -H "Content-Type: application/json" --data-binary @- <<BODY
{"model": "$model", "messages": [{"role": "user", "content": [
  {"type": "text", "text": "$question"},
  {"type": "image_url", "image_url": {"url": "data:image/png;base64,$image"}}
]}]}
BODY
