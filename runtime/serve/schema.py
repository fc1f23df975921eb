"""What a chat completion may ask for: OpenAI's request, and whatever of it is not implemented refused by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from plugins.errors import FlexError
from plugins.files import parse_json
from runtime.serve.errors import ApiError
from runtime.serve.settings import Settings

_TEXT, _PARTS = "(text)", "(parts)"  # tags of what may be a text or a list; no field has such a name
_ROLES = {"developer": "system"}  # a newer word of OpenAI's for the same


def _form(value: object) -> str:
    return _TEXT if isinstance(value, str) else _PARTS


class _Refused(ValueError):
    """A field that is wrong. code: see ApiError. what: the end of a sentence that begins with the field's name."""

    def __init__(self, code: str, name: str, what: str) -> None:
        super().__init__(what)
        self.code, self.name, self.what = code, name, what


class _Strict(BaseModel):
    """An object in which every field is known. `off`: fields that are not implemented, with the values, beside null,
    that ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    off: ClassVar[Mapping[str, Sequence[object]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """One error for what is unknown, however much there is, and none for what is switched off."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.off:
                shown = ascii(name[:60])[1:-1]  # it may hold half a character, which no message of pydantic's can
                raise _Refused("unknown_option", shown, "is no option that this server knows")
            elif value is not None and not any(type(value) is type(off) and value == off for off in cls.off[name]):
                raise _Refused("unsupported_option", name, "is not implemented by this server")
        return kept


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class _Part(_Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None

    @model_validator(mode="after")
    def _is_what_it_says(self) -> _Part:
        for name in ("text", "image_url"):
            if (getattr(self, name) is not None) != (self.type == name):
                found = "is missing" if self.type == name else f"does not go with the type {self.type}"
                raise _Refused("invalid_value", name, found)
        return self


class _Message(_Strict):
    off: ClassVar[Mapping[str, Sequence[object]]] = {  # an answer as OpenAI's client hands it back has them all
        "name": (),
        "refusal": (),
        "audio": (),
        "function_call": (),
        "tool_calls": ([],),
        "annotations": ([],),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[_Part], Field(min_length=1, max_length=64), Tag(_PARTS)],
        Discriminator(_form),
    ]


class _StreamOptions(_Strict):
    off: ClassVar[Mapping[str, Sequence[object]]] = {"include_obfuscation": (False,)}
    include_usage: bool | None = None


class _Flex(_Strict):
    selection: bool = False
    page_budget: Annotated[int, Field(ge=0)] | None = None


class _ChatCompletion(_Strict):
    off: ClassVar[Mapping[str, Sequence[object]]] = {
        "audio": (),
        "frequency_penalty": (0, 0.0),
        "function_call": ("none", "auto"),  # without functions, neither calls any
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "n": (1,),
        "parallel_tool_calls": (False, True),  # of no tools
        "prediction": (),
        "presence_penalty": (0, 0.0),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": (),
        "web_search_options": (),
    }
    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[str], Tag(_PARTS)], Discriminator(_form)
    ] | None = None  # fmt: skip
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None  # who asks: no answer of OpenAI's depends on it either
    safety_identifier: str | None = None  # the same
    prompt_cache_key: str | None = None  # images are found again by their content
    flex: _Flex | None = None


@dataclass(frozen=True)
class ImageUrl:
    """Where a request says its image is; `param`: and where it says so."""

    url: str
    param: str

    @property
    def is_data(self) -> bool:
        """Whether the URL is the image."""
        return self.url[:5].lower() == "data:"


@dataclass(frozen=True)
class Asked:
    """A request, checked as far as that needs no model.

    messages: for the engine, "role" and "content" of each. image: None = text alone. max_tokens: None = the server's.
    options: of `runtime.Options`. flex, selection: the extension was asked for, and the cells of each token.
    """

    model: str
    messages: list[dict[str, str]]
    image: ImageUrl | None
    max_tokens: int | None
    options: dict[str, Any]
    stream: bool
    include_usage: bool
    flex: bool
    selection: bool


def read(body: bytes, settings: Settings) -> Asked:
    """The request in `body`. ApiError (400) for everything that is not a chat completion this server can answer."""
    try:
        given = parse_json(body, "the body", FlexError)
    except FlexError as error:
        raise ApiError(400, error.found, code="invalid_json", fix="send JSON") from None
    if isinstance(given, dict) and isinstance(given.get("messages"), list):
        count = len(given["messages"])
        if count > settings.messages:  # before each is looked at
            raise _wrong("messages", f"has {count} entries; expected at most {settings.messages}", "too_many_messages")
    try:
        asked = _ChatCompletion.model_validate(given)
    except ValidationError as error:
        raise _first(error) from None
    return _asked(asked, settings)


def _asked(asked: _ChatCompletion, settings: Settings) -> Asked:
    messages, image, detail = _messages(asked.messages)
    length = sum(len(message["content"]) for message in messages)
    if length > settings.characters:
        raise _wrong("messages", f"hold {length} characters; expected at most {settings.characters}", "prompt_too_long")
    most = {number for number in (asked.max_tokens, asked.max_completion_tokens) if number is not None}
    if len(most) > 1:
        raise _wrong("max_tokens", "differs from max_completion_tokens; expected one of them", "invalid_value")
    if asked.stream_options is not None and not asked.stream:
        raise _wrong("stream_options", "does not go without stream: true", "invalid_value")
    flex = asked.flex or _Flex()
    options: dict[str, Any] = {"temperature": asked.temperature, "top_p": asked.top_p, "stop": asked.stop}
    if asked.temperature:  # greedy answers are the same with any seed
        options["seed"] = asked.seed
    options["page_budget"] = flex.page_budget
    if detail == "low":  # what the model sees without hi-res pages
        if flex.page_budget:
            raise _wrong("flex.page_budget", "does not go with an image of detail low", "invalid_value")
        options["page_budget"] = 0
    return Asked(
        model=asked.model,
        messages=messages,
        image=image,
        max_tokens=most.pop() if most else None,
        options={name: value for name, value in options.items() if value is not None},
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        flex=asked.flex is not None,
        selection=flex.selection,
    )


def _messages(given: Sequence[_Message]) -> tuple[list[dict[str, str]], ImageUrl | None, str | None]:
    """What the engine takes, and the one image with its detail."""
    messages, image, detail = [], None, None
    for index, message in enumerate(given):
        parts = [] if isinstance(message.content, str) else message.content
        for place, part in enumerate(parts):
            if part.image_url is None:
                continue
            param = f"messages[{index}].content[{place}].image_url"
            if message.role != "user":
                raise _wrong(param, f"is in a message of the {message.role}; expected: the user's", "invalid_value")
            if image is not None:
                raise _wrong(param, "is a second image; expected one in a conversation", "too_many_images")
            image, detail = ImageUrl(part.image_url.url, f"{param}.url"), part.image_url.detail
        text = "\n".join(part.text for part in parts if part.text is not None)
        content = message.content if isinstance(message.content, str) else text
        if message.role == "assistant":  # official: no space stands before or behind what is remembered
            content = content.strip()
        messages.append({"role": _ROLES.get(message.role, message.role), "content": content})
    return messages, image, detail


def _wrong(param: str, what: str, code: str) -> ApiError:
    return ApiError(400, f"{param} {what}", code=code, param=param)


def _first(error: ValidationError) -> ApiError:
    """The first thing that is wrong, with its place in the request."""
    found = error.errors(include_url=False, include_input=False)[0]
    refused = (found.get("ctx") or {}).get("error")
    place = [each for each in found["loc"] if each not in (_TEXT, _PARTS)]
    if isinstance(refused, _Refused):
        code, what, place = refused.code, refused.what, [*place, refused.name]
    else:
        code, what = "invalid_value", f"is not right: {found['msg'][:1].lower()}{found['msg'][1:]}"
    param = ""
    for each in place:
        param += f"[{each}]" if isinstance(each, int) else f".{each}" if param else str(each)
    fix = {"unknown_option": "leave it out", "unsupported_option": "leave it out, or null"}.get(code)
    return ApiError(400, f"{param or 'the body'} {what}", code=code, param=param or None, fix=fix)
