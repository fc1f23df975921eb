"""A bundle behind HTTP, as every client of OpenAI's API knows it: `python -m runtime.serve BUNDLE`, or `app(engine)` in
an app of yours. docs/server.md tells the API."""

from flexattention_deploy import require_extra

require_extra("serve")

from runtime.serve.application import app  # noqa: E402 - only now it is known to be there
from runtime.serve.settings import Settings  # noqa: E402

__all__ = ["Settings", "app"]
