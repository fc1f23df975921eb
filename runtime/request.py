"""What goes into a request: its options, and the question as the ids a decoder is fed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from engines.bundle.manifest import Manifest
from engines.checks import require_integer, shown
from engines.errors import ContextError, OptionError, PromptError
from runtime.sampling import Sampling
from runtime.text.conversation import Conversation, Prompt
from runtime.text.prompter import Prompter

MOST_TOKENS = 2**31 - 1  # of an answer, as a number; how many fit is the bundle's context
# Not "build with a larger --context": most bundles have all that their model has, and the build would refuse more.
SHORTEN = "shorten the prompt; a bundle built with --context takes more when built without"
STOP_STRINGS, STOP_LENGTH = 64, 1024  # each token is compared with all of them


@dataclass(frozen=True)
class Options:
    """Options of one request: their names, defaults and ranges.

    max_new_tokens: answer tokens at most. temperature: 0 = greedy; top_k (0 = off), top_p (1 = off) and seed need a
    temperature. stop: a string or several that end the answer, not part of it. stop_at_eos: end at the model's end
    token. page_budget: pages each layer reads at most, 0 .. the bundle's; None = the bundle's. trace: keep logits and
    cells. special_tokens: control tokens and "<image>" in the prompt are those, as in the official code; otherwise what
    a user types is text, whatever it looks like.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    page_budget: int | None = None
    trace: bool = False
    special_tokens: bool = False

    def __post_init__(self) -> None:
        """Checks every field, and makes Python's numbers of NumPy's, which wrap around. Raises OptionError."""
        settle, sampling = partial(object.__setattr__, self), self.sampling()  # which checks its own
        for field in fields(sampling):
            settle(field.name, getattr(sampling, field.name))
        most, budget = self.max_new_tokens, self.page_budget
        settle("max_new_tokens", require_integer(most, f"max_new_tokens={shown(most)}", 1, MOST_TOKENS))
        settle("page_budget", require_integer(budget, f"page_budget={shown(budget)}", 0, none="the bundle's"))
        for name in ("stop_at_eos", "trace", "special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={shown(getattr(self, name))}", expected="True or False")
        settle("stop", _stop_strings(self.stop))

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """Options from keyword arguments; OptionError for an unknown name or a value out of range."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"unknown option {', '.join(unknown)}", expected=f"some of {', '.join(known)}")
        return cls(**given)

    def sampling(self) -> Sampling:
        """The part that chooses tokens."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def _stop_strings(given: object) -> tuple[str, ...]:
    """Of the option `stop`; OptionError for anything but a string or several, not too many and not too long."""
    try:
        if isinstance(given, bytes | bytearray | memoryview):
            raise TypeError
        several: Iterable[object] = (given,) if isinstance(given, str) else given  # type: ignore[assignment]
        found = list(islice(several, STOP_STRINGS + 1))
    except TypeError:  # nothing to iterate over, or an array without dimensions
        raise OptionError(f"stop={shown(given)}", expected="a string or several") from None
    if len(found) > STOP_STRINGS:
        raise OptionError(f"more than {STOP_STRINGS} stop strings", expected=f"at most {STOP_STRINGS}")
    for text in found:
        length = len(text) if isinstance(text, str) else 0
        if not 0 < length <= STOP_LENGTH:
            what = f"a stop string of {length} characters" if length else f"stop={shown(given)}"
            raise OptionError(what, expected=f"non-empty strings of at most {STOP_LENGTH} characters")
    return tuple(map(str, found))


@dataclass(frozen=True, eq=False)
class Request:
    """A question that was checked against the bundle: it fits, and nothing about it is left to find out.

    ids: the prompt, [n] int64, where -1-j is image feature j. begin: position of image feature 0 (0 without an image).
    runs: where the runs end in which the prompt is prefilled, ascending, the last at n - 1: with the image, and with
    each earlier question. Each time without the prompt's, or the question's, last token: that one is a decode step,
    which reads pages. page_budget: pages each layer reads at most. ends: token ids that end the answer.
    """

    ids: np.ndarray
    begin: int
    runs: tuple[int, ...]
    page_budget: int
    ends: frozenset[int]
    options: Options

    def known(self, held: np.ndarray, runs: tuple[int, ...]) -> int:
        """How many of the ids a cache need not be fed that holds `held`, prefilled in `runs`: whole runs of both."""
        return shared_runs(self.ids, self.runs, held, runs)

    @property
    def room(self) -> int:
        """Tokens a cache must have room for: the prompt and the answer, whose last token is never fed."""
        return len(self.ids) + self.options.max_new_tokens - 1


def answer_room(prompt: int, context: int) -> int:
    """Tokens that an answer may have behind a prompt of so many: its last one is never fed. Below 1 there is no room
    for any."""
    return context - prompt + 1


def shared_runs(ids: np.ndarray, runs: tuple[int, ...], held: np.ndarray, held_runs: tuple[int, ...]) -> int:
    """How many tokens two caches, or a request and a cache, begin with alike, in whole runs of both."""
    shared = min(len(held), len(ids))
    differ = np.flatnonzero(held[:shared] != ids[:shared])
    same = int(differ[0]) if differ.size else shared
    return max((end for end in runs if end <= same and end in held_runs), default=0)


def read_request(
    prompt: Prompt | None,
    input_ids: Sequence[int] | None,
    given: Mapping[str, Any],
    *,
    has_image: bool,
    prompter: Prompter,
    manifest: Manifest,
) -> Request:
    """A question, as text, as the end of a conversation or as token ids, with the `given` options, checked.

    Raises OptionError for options that are unknown or out of range, PromptError for a prompt that is no prompt or does
    not go with the image (or the lack of one), and ContextError for one that leaves no room for the answer.
    """
    options, context = Options.parse(given), manifest.geometry.context
    asked, turns = read_prompt(prompt, input_ids), list[int]()

    def room(shorter: Conversation) -> int:
        ids, _ = prompter.encode_turns(shorter, has_image, special_tokens=options.special_tokens)
        return len(prompter.expand(ids, has_image)[0]) + options.max_new_tokens - 1

    if asked is not None:
        if not may_fit(asked.characters, prompter, context):  # before it is made tokens, which takes memory
            raise too_many_characters(asked, room, asked.characters, prompter, context)
        input_ids, turns = prompter.encode_turns(asked, has_image, special_tokens=options.special_tokens)
    else:
        assert input_ids is not None  # read_prompt saw to it
        check_count(input_ids, "input_ids", context)
    request = request_of(input_ids, turns, options, has_image=has_image, prompter=prompter, manifest=manifest)
    if request.room > context:
        prompt_tokens, answer = len(request.ids), options.max_new_tokens
        others = [f"max_new_tokens={left}"] if (left := answer_room(prompt_tokens, context)) > 0 else []
        raise too_long(asked, room, prompt_tokens, f"up to {answer} answer tokens", prompter, context, others)
    return request


def read_prompt(prompt: Prompt | None, input_ids: Sequence[int] | None) -> Conversation | None:
    """What is asked, as text; None for raw ids. PromptError unless one of the two is given, and for no prompt."""
    if prompt is None and input_ids is None:
        raise PromptError("no prompt", expected="one of prompt and input_ids")
    if prompt is not None and input_ids is not None:
        raise PromptError("both prompt and input_ids", expected="one of them")
    return None if prompt is None else Conversation.read(prompt)


def request_of(
    input_ids: Sequence[int],
    turns: Sequence[int],
    options: Options,
    *,
    has_image: bool,
    prompter: Prompter,
    manifest: Manifest,
) -> Request:
    """A request of token ids, -200 for the image, with `options`; whether it fits is left to see. `turns`: how many of
    the ids come before each earlier answer. Raises OptionError for a page budget above the bundle's, PromptError for
    ids that are out of range or do not go with the image (or the lack of one)."""
    geometry, budget, most = manifest.geometry, options.page_budget, manifest.page_budget
    if budget is not None and budget > most:
        raise OptionError(f"page_budget={shown(budget)}", expected=f"at most the bundle's {most}")
    ids, begin = prompter.expand(input_ids, has_image)
    image_end = begin + geometry.image_tokens if has_image else 0
    # What the image adds to the ids lies before the turns that come after it.
    shift = geometry.image_tokens - 1 if has_image else 0
    ends = {image_end, *(end + (shift if end > begin else 0) - 1 for end in turns), len(ids) - 1}
    return Request(
        ids,
        begin,
        tuple(sorted(end for end in ends if 0 < end < len(ids))),
        (most if budget is None else budget) if has_image else 0,
        frozenset(manifest.prompt.eos_token_ids if options.stop_at_eos else ()),
        options,
    )


TokensNeeded = Callable[[Conversation], int]  # room that a cache must have for a conversation and what follows it


def too_long(
    asked: Conversation | None,
    needed: TokensNeeded,
    prompt: int,
    behind: str,
    prompter: Prompter,
    context: int,
    others: Sequence[str] = (),
) -> ContextError:
    """What to say of a request that has no room. `asked`: None for raw ids. `prompt`: its tokens. `behind`: what is to
    follow them. `others`: fixes beside forgetting the turns before."""
    turns = len(asked.history.turns) if asked else 0
    what = f"a conversation of {turns + 1} questions in" if turns else "a prompt of"
    return _context_error(
        f"{what} {prompt} tokens (image included) and {behind}",
        f"at most {context} tokens together",
        _turns_that_fit(asked, needed, prompter, context) if asked else None,
        others,
    )


def may_fit(characters: int, prompter: Prompter, context: int) -> bool:
    """Whether that many characters can be as few tokens as the context has; True where no token has any."""
    return not prompter.longest or characters <= context * prompter.longest


def too_many_characters(
    asked: Conversation, needed: TokensNeeded, characters: int, prompter: Prompter, context: int
) -> ContextError:
    """What to say of text that cannot fit, however it is cut into tokens."""
    return _context_error(
        f"a prompt of {characters} characters",
        f"at most {context * prompter.longest}: {context} tokens of at most {prompter.longest} characters",
        _turns_that_fit(asked, needed, prompter, context),
        (),
    )


def _context_error(found: str, expected: str, kept: int | None, others: Sequence[str]) -> ContextError:
    """`kept`: of _turns_that_fit. `others`: fixes beside forgetting the turns before."""
    forget = [] if kept is None else [f"chat.keep({kept}), which forgets all but the last {kept} turns"]
    error = ContextError(
        found,
        expected=expected + ("" if kept is None else f": with {kept} earlier turns it fits"),
        fix=", or ".join([*forget, *others]) or SHORTEN,
    )
    error.turns = kept
    return error


def _turns_that_fit(asked: Conversation, needed: TokensNeeded, prompter: Prompter, context: int) -> int | None:
    """How many turns of the history fit with the question and what follows it, the last ones, given that not all do;
    None when the question alone does not."""

    def fits(kept: int) -> bool:
        shorter = replace(asked, history=asked.history.last(kept))
        return may_fit(shorter.characters, prompter, context) and needed(shorter) <= context

    fit, more = -1, len(asked.history.turns)  # so many turns fit, or not even none; so many do not
    while more - fit > 1:
        middle = (fit + more) // 2
        fit, more = (middle, more) if fits(middle) else (fit, middle)
    return fit if fit >= 0 else None


def check_count(ids: object, name: str, context: int) -> None:
    """ContextError for more ids, which it calls by `name`, than `context`, before they are made an array: that of a
    range takes memory."""
    try:
        count = len(ids) if isinstance(ids, Sized) else 0  # what has no length is refused as no list
    except OverflowError:
        count = sys.maxsize
    except TypeError:  # an array without dimensions
        count = 0
    if count > context:
        raise ContextError(
            f"{count} {name}",
            expected=f"at most {context} tokens, image and answer included",
            fix="shorten the prompt",
        )
