"""Ask a running server with OpenAI's own package: python examples/openai_client.py [PICTURE] [QUESTION] [--url URL].

The server: python -m runtime.serve build/default-fp16. The package: pip install openai.
"""

import argparse
import os
from base64 import b64encode
from pathlib import Path

from openai import APIError, OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", type=Path, default="examples/poster.png")
parser.add_argument("question", nargs="?", default="what numbers are in the red star and the cyan circle?")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server")
given = parser.parse_args()

try:
    client = OpenAI(base_url=given.url, api_key=os.environ.get("FLEX_API_KEY", "none needed"))
    model = client.models.list().data[0].id  # the one bundle that the server has
    image = f"data:image/png;base64,{b64encode(given.picture.read_bytes()).decode()}"  # or image/jpeg, ...
    content = [{"type": "text", "text": given.question}, {"type": "image_url", "image_url": {"url": image}}]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        stream=True,
        extra_body={"flex": {"selection": True}},  # no client needs it: it tells where the model looks
    )
    pages = []
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
        if cells := getattr(chunk, "flex", {}).get("cells"):  # of one token, a list for each layer that reads pages
            pages.append("/".join(str(len(layer)) for layer in cells))
    print(f"\npages that the layers read for each token: {', '.join(pages)}")
except (APIError, OSError) as error:
    raise SystemExit(f"error: {error}") from None
