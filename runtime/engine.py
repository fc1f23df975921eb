"""`Engine`: a bundle folder in, answers out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from engines.backend import Model, Opening
from engines.bundle.folder import Bundle
from engines.errors import BundleError
from engines.open import open_model
from runtime.answer import Answer
from runtime.decode import Stream
from runtime.image import ImageSource
from runtime.prompt import Prompter
from runtime.view import ImageView


class Engine:
    """An opened bundle. Not thread-safe: one request at a time. No request leaves anything behind for the next.

    manifest, geometry: of the bundle. prompter: its text side. model: its three parts, opened.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        backend: str | None = Opening.backend,
        device: str | None = Opening.device,
        threads: int | None = Opening.threads,
        verify: bool = True,
        expect: str | None = None,
    ) -> None:
        """Open a bundle folder. `backend`, `device`, `threads`: see Opening. `verify`: check the SHA-256 of every file,
        which takes about 10 s for 13 GB. `expect`: the digest the whole bundle must have, "sha256:...", as
        `python -m engines.doctor BUNDLE` prints it. Raises BundleError, BackendError, TokenizerError."""
        if not isinstance(bundle, str | os.PathLike):
            raise BundleError(f"a bundle of type {type(bundle).__name__}", expected="the path of a bundle folder")
        opened = Bundle(bundle, verify=verify, expect=expect)
        self.manifest = opened.manifest
        self.geometry = opened.manifest.geometry
        prompt = opened.manifest.prompt
        self.prompter = Prompter(
            opened.file(prompt.tokenizer) if prompt.tokenizer else None,
            template=prompt.template,
            bos_id=prompt.bos_token_id,
            vocab=self.geometry.vocab,
            image_tokens=self.geometry.image_tokens,
        )
        self.model: Model[Any] = open_model(opened, Opening(backend, device, threads))

    def generate(
        self,
        image: ImageSource | None,
        prompt: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer `prompt` about `image` (path, bytes, PIL image, uint8 array [H, W, 3], or None for text alone).

        `input_ids` instead of `prompt`: raw token ids, -200 where the image goes. `options`: fields of `Options`.
        Raises ImageError, PromptError, OptionError or BackendError; the engine stays usable after each.
        """
        return self.image(image).stream(prompt, input_ids=input_ids, **options).answer()

    def stream(
        self,
        image: ImageSource | None,
        prompt: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Stream:
        """Like `generate`, as an iterator of text pieces; `.answer()` then gives the whole answer."""
        return self.image(image).stream(prompt, input_ids=input_ids, **options)

    def image(self, image: ImageSource | None) -> ImageView:
        """Hold on to an image for several questions: `with engine.image(photo) as view: view.ask("..."), ...`.

        Vision and page projection run once, and the cache keeps the prompt up to and including the image. ImageError
        for an image that cannot be read.
        """
        return ImageView(self.model, self.prompter, self.manifest, image)
