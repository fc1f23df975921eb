"""`Engine`: a bundle folder in, answers out."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engines.backend import Model, Opening
from engines.bundle.folder import Bundle
from engines.errors import BundleError, OptionError
from engines.memory import release_freed
from engines.open import chosen, open_model
from engines.residency import ALL
from runtime.answer import Answer
from runtime.batch import Batch
from runtime.chat import Chat
from runtime.decode import InOneProcess, Stream
from runtime.image import EXIF, ImageSource
from runtime.many import generate_many
from runtime.request import Options
from runtime.score.walk import Score
from runtime.text.conversation import Prompt
from runtime.text.prompter import Prompter
from runtime.view import ImageView

_models = weakref.WeakSet[Model[Any]]()  # all that live


def _keep_models() -> None:
    """In a fork: never free the parent's models. ONNX Runtime would wait for threads that are not there, or crash."""
    for model in list(_models):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(model))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_models)


class Engine(InOneProcess):
    """An opened bundle, until it is closed: `with Engine(path) as engine: ...`, or `engine.close()`.

    With several slots, requests that run at the same time share decode steps: see runtime.batch.Batch.

    No request leaves anything behind for the next. With ONNX Runtime, and with slots, several threads may ask at the
    same time, each reading the answer it asked for; with TensorRT and one slot one request runs at a time. An engine
    belongs to its process: it cannot be pickled or copied, and a fork cannot ask it (BackendError). Open the bundle in
    each process.

    slots: requests at a time. manifest, geometry: of the bundle. digest: "sha256:...", one for all of it. backend: one
    of engines.bundle.kinds.BACKENDS; device: "cpu" or "cuda"; what runs it. prompter: its text side. model: its three
    parts, opened; gone once it is closed.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        backend: str | None = Opening.backend,
        device: str | None = Opening.device,
        threads: int | None = Opening.threads,
        slots: int = Opening.slots,
        prefill_chunk: int = Opening.prefill_chunk,
        residency: str | None = Opening.residency,
        verify: bool = True,
        expect: str | None = None,
    ) -> None:
        """Open a bundle folder. `backend`, `device`, `threads`, `slots`, `prefill_chunk`, `residency`: see Opening.
        `verify`: check the SHA-256 of every file, which takes about 10 s for 13 GB. `expect`: the digest the whole
        bundle must have, "sha256:...", as `python -m engines.doctor BUNDLE` prints it. Raises BundleError,
        BackendError, TokenizerError."""
        super().__init__()
        if not isinstance(bundle, str | os.PathLike):
            raise BundleError(f"a bundle of type {type(bundle).__name__}", expected="the path of a bundle folder")
        opened = Bundle(bundle, verify=verify, expect=expect)
        self.manifest = opened.manifest
        self.geometry = opened.manifest.geometry
        self.digest = opened.digest
        opening = Opening(backend, device, threads, slots, prefill_chunk, residency)
        self.backend, self.device, self._residency = chosen(opened, opening)
        self.slots = opening.slots
        prompt = opened.manifest.prompt
        self.prompter = Prompter(
            opened.file(prompt.tokenizer) if prompt.tokenizer else None,
            template=prompt.template,
            turn=prompt.turn,
            system=prompt.system,
            bos_id=prompt.bos_token_id,
            vocab=self.geometry.vocab,
            image_tokens=self.geometry.image_tokens,
            ends=prompt.eos_token_ids,
        )
        self._views, self._changing = weakref.WeakSet[ImageView](), threading.Lock()
        self.model: Model[Any] = open_model(opened, opening)
        self._batch = Batch(self.model, opening.slots, opening.prefill_chunk) if opening.slots > 1 else None
        _models.add(self.model)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and close every view of it; neither can be asked again (OptionError). An answer that runs goes
        on, and keeps what it needs until it is read or dropped. Closing twice is allowed."""
        with self._changing:
            vars(self).pop("model", None)
            self._batch = None
            views = list(self._views)
        for view in views:
            view.close()
        release_freed()

    def generate(
        self,
        image: ImageSource | None,
        prompt: Prompt | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        exif: bool = EXIF,
        **options: Any,
    ) -> Answer:
        """Answer `prompt` about `image`: path, encoded bytes, binary file, PIL image, uint8 array [H, W, 3], a "data:"
        URL or base64 text, as runtime.image.load_image takes them; None for text alone.

        `prompt`: a question, or a conversation that ends with one: messages {"role": ..., "content": text}, of "user"
        and "assistant" in turn, a "system" message before them where the bundle's template has a place for it.
        `input_ids` instead of `prompt`: raw token ids, -200 where the image goes. `exif`: turn the image upright, as
        its EXIF block says; False leaves it as it is stored, as the official code does. `options`: fields of `Options`.
        Raises ImageError, PromptError, OptionError or BackendError; the engine stays usable after each.
        """
        return self.image(image, exif=exif).stream(prompt, input_ids=input_ids, **options).answer()

    def stream(
        self,
        image: ImageSource | None,
        prompt: Prompt | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        exif: bool = EXIF,
        **options: Any,
    ) -> Stream:
        """Like `generate`, as an iterator of text pieces; `.answer()` then gives the whole answer."""
        return self.image(image, exif=exif).stream(prompt, input_ids=input_ids, **options)

    def score(
        self,
        image: ImageSource | None,
        prompt: Prompt | None = None,
        continuation: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        continuation_ids: Sequence[int] | None = None,
        exif: bool = EXIF,
        page_budget: int | None = Options.page_budget,
        special_tokens: bool = Options.special_tokens,
    ) -> Score:
        """How likely `continuation` is as the answer to `prompt`: the log-probability of each of its tokens, given the
        prompt and the tokens before it, none of them chosen by the model. Nothing is sampled, no end token is added.

        `image`, `prompt`, `input_ids`, `exif`: see `generate`. `continuation`: the answer as text, which stands where
        the bundle's conversations have one (officially behind a space, which is not part of it). Prompt and answer are
        tokenised as one text, the official way: its tokens are those it has there, and one that spans the seam is the
        answer's, not the prompt's. `continuation_ids`: token ids instead, which follow whatever the prompt is; after
        `input_ids` nothing else can. `page_budget`, `special_tokens`: see `Options`; of both texts.

        Each token is predicted by a decode step that reads its own pages, as when the model answers: the first by that
        of the prompt's last token. Several answers to one question: `engine.image(photo).score(question, [...])`.
        Raises PromptError (no continuation, ids out of range), ContextError when both do not fit together, ImageError,
        OptionError or BackendError; the engine stays usable after each.
        """
        (score,) = self.image(image, exif=exif).score(
            prompt,
            None if continuation is None else [continuation],
            input_ids=input_ids,
            continuation_ids=None if continuation_ids is None else [continuation_ids],
            page_budget=page_budget,
            special_tokens=special_tokens,
        )
        return score

    def chat(
        self, image: ImageSource | None, messages: Sequence[Mapping[str, object]] = (), *, exif: bool = EXIF
    ) -> Chat:
        """A conversation about an image, which goes on from `messages`: `chat.ask("...")`, `chat.ask("...")`. See Chat;
        errors of `image`, and PromptError."""
        return self.image(image, exif=exif).chat(messages)

    def generate_many(
        self,
        requests: Iterable[tuple[ImageSource | None, Prompt]],
        *,
        progress: bool | Callable[[float], None] = False,
        exif: bool = EXIF,
        **options: Any,
    ) -> list[Answer]:
        """Answer many prompts, each about its image, `slots` at a time; the answers in their order.

        requests: what `generate` takes, in pairs. Questions about one image should follow each other, as the same
        object: it is encoded once for them, while those before it are answered (with the residency "shared", when it is
        its turn). progress: True shows a bar, a function
        is told the part that is done, 0 .. 1, where `requests` has a length. Raises what `generate` does, with the
        number of the request; those that run are dropped.
        """
        ahead = self._residency == ALL  # else vision would lie beside what decodes
        return generate_many(self.image, self.slots, requests, progress, exif, options, ahead=ahead)

    def image(self, image: ImageSource | None, *, exif: bool = EXIF) -> ImageView:
        """Hold on to an image for several questions: `with engine.image(photo) as view: view.ask("..."), ...`.

        Vision and page projection run once, and the cache keeps the prompt up to and including the image. `exif`: see
        `generate`. ImageError for an image that cannot be read, OptionError when the engine is closed.
        """
        view = ImageView(self._opened(), self.prompter, self.manifest, image, exif=exif, batch=self._batch)
        with self._changing:
            self._views.add(view)
            closed = "model" not in vars(self)  # by another thread, which has not seen this view
        if closed:
            view.close()
        return view

    @property
    def steps(self) -> int:
        """Decode steps that its slots have made so far, each for all rows that were taken; 0 with one slot."""
        return 0 if self._batch is None else self._batch.steps

    def require_usable(self) -> None:
        """Raises what any question would get now: OptionError when the engine is closed, BackendError in a fork,
        BundleError when the bundle was written to since it was opened."""
        self._opened().require_unchanged()

    def _opened(self) -> Model[Any]:
        self._require_own_process()
        model: Model[Any] | None = vars(self).get("model")
        if model is None:
            raise OptionError("this engine is closed", fix="open the bundle again: Engine(path)")
        return model
