"""Which tokens begin, end and pad a text: generation_config.json, and the settings beside a tokenizer.

An answer ends at what `generate` of the official code ends it at: `eos_token_id` of generation_config.json, and of
config.json where that file is absent or does not say. A prompt begins with the BOS of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engines.checks import shown
from engines.errors import ConfigError, TokenizerError
from export.checkpoint.config_keys import GENERATION, SAMPLING, TOKENIZER
from export.checkpoint.settings import parse, present, read_object

GENERATION_FILE = "generation_config.json"
SETTINGS, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_ENDS = 256  # ids that may end an answer: Llama 3.1 has 3
_PADS = ("<pad>", "[PAD]", "<|pad|>")  # names of a pad token where no file says which it is

TokenIds = int | Annotated[list[int], Field(max_length=_ENDS)] | None


class _Generation(BaseModel):
    """What generation_config.json says that is obeyed."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    eos_token_id: TokenIds = None


@dataclass(frozen=True)
class Generation:
    """eos_ids: what ends an answer, None where the file does not say. unknown: keys nobody knows, with their file.
    notes: what is not obeyed, for people."""

    eos_ids: tuple[int, ...] | None
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside a tokenizer say: the texts of its BOS, EOS and pad token (None: it has none), whether a
    prompt begins with BOS, whether a text gets a space before it (None: SentencePiece's own model decides), whether the
    parts of it behind special tokens get one too (legacy), which of "bos" and "eos" they name themselves, and `notes`,
    what is not obeyed, for people."""

    bos: str | None
    eos: str | None
    pad: str | None
    adds_bos: bool
    adds_space: bool | None
    legacy: bool
    named: frozenset[str]
    notes: tuple[str, ...]

    def is_pad(self, text: str) -> bool:
        """Whether `text` is the pad token, and nothing else besides."""
        return (text == self.pad or text in _PADS) and text not in (self.bos, self.eos)


def read_generation(folder: Path, config: Mapping[str, Any]) -> Generation:
    """What the checkpoint in `folder` says of generating. Without generation_config.json, older transformers kept the
    same keys in config.json, which is `config`. Raises ConfigError, as for every settings file."""
    path = folder / GENERATION_FILE
    if not present(path):
        return Generation(None, (), _notes("config.json", config))
    given = read_object(path)
    eos = parse(_Generation, given, path).eos_token_id
    unknown = tuple(f"{GENERATION_FILE}: {key}" for key in GENERATION.unknown(given))
    return Generation(None if eos is None else as_ids(eos), unknown, _notes(GENERATION_FILE, given))


def as_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """The ids of `eos_token_id` in any of its spellings, each once."""
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(dict.fromkeys(ids))


def require_in_vocabulary(ids: tuple[int, ...], vocab: int, found: str) -> None:
    """ConfigError for a token id outside `vocab`; found: the file and the key, for the message."""
    for index in ids:
        if not 0 <= index < vocab:
            raise ConfigError(
                f"{found} is {shown(index)}",
                expected=f"0 .. {vocab - 1}: vocab_size is {vocab}",
                fix="give the id of the token, as the tokenizer of this checkpoint has it",
            )


def _notes(name: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """What `given`, read from the file `name`, asks of generating that only a request decides here."""
    asked = GENERATION.refused(given)
    if given.get("do_sample"):
        asked += [key for key in SAMPLING if given.get(key) is not None]
    said = ", ".join(f"{key} {shown(given[key])}" for key in asked)
    return (f"{name}: not obeyed: {said}; answers are greedy unless a request asks otherwise",) if asked else ()


def read_special_tokens(folder: Path) -> SpecialTokens:
    """What special_tokens_map.json and tokenizer_config.json of `folder` say; LLaMA's tokens where they do not.

    Raises TokenizerError when they contradict each other or ask for what no prompt here does (EOS behind every part),
    and for a file that is none.
    """
    settings, names = optional(folder / SETTINGS), optional(folder / SPECIAL_MAP)
    TOKENIZER.check(settings, folder / SETTINGS, TokenizerError)
    unknown = TOKENIZER.unknown(settings)
    notes = [f"{SETTINGS}: unknown to this project, not obeyed: {', '.join(unknown)}"] if unknown else []
    if settings.get("clean_up_tokenization_spaces"):
        notes.append(f"{SETTINGS}: not obeyed: clean_up_tokenization_spaces: answers keep the spaces of their tokens")

    def flag(key: str) -> bool | None:
        value = settings.get(key)
        if value is not None and not isinstance(value, bool):
            raise TokenizerError(f"{folder / SETTINGS}: {key} is {shown(value)}", expected="true or false")
        return value

    def text(key: str, usual: str | None) -> str | None:
        said = {file: _content(given[key], folder / file, key) for file, given in
                ((SETTINGS, settings), (SPECIAL_MAP, names)) if key in given}  # fmt: skip
        found = {each for each in said.values() if each is not None}
        if len(found) > 1:
            raise TokenizerError(
                f"{folder}: {key} is {shown(said[SETTINGS])} in {SETTINGS} and {shown(said[SPECIAL_MAP])} in "
                f"{SPECIAL_MAP}",
                expected="the same in both",
                fix="keep the one that the model was trained with",
            )
        return found.pop() if found else None if said else usual

    return SpecialTokens(
        text("bos_token", "<s>"),
        text("eos_token", "</s>"),
        text("pad_token", None),
        flag("add_bos_token") is not False,
        flag("add_prefix_space"),
        flag("legacy") is not False,
        frozenset(kind for kind in ("bos", "eos") if {**settings, **names}.get(f"{kind}_token") is not None),
        tuple(notes),
    )


def _content(token: Any, path: Path, key: str) -> str | None:
    """The text of a token: as it is, or of a serialised AddedToken."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"{path}: {key} is {shown(token)}", expected="a token's text")
    return text


def added_tokens(folder: Path) -> list[tuple[int, str, bool]]:
    """(id, text, special) of the tokens that added_tokens.json and tokenizer_config.json of `folder` name, by id; those
    of the vocabulary itself may be among them. TokenizerError for what is malformed or contradicts itself."""
    added: dict[int, tuple[str, bool]] = {}

    def take(index: Any, text: Any, special: Any) -> None:
        if not (isinstance(text, str) and isinstance(special, bool) and isinstance(index, int | str)):
            raise ValueError
        known = added.get(int(index))
        if known is not None and known[0] != text:
            raise TokenizerError(
                f"{folder}: token {int(index)} is {shown(known[0])} in {ADDED} and {shown(text)} in {SETTINGS}",
                expected="the same in both",
            )
        added[int(index)] = (text, special)

    try:
        for text, index in optional(folder / ADDED).items():
            take(index, text, True)
        decoder = optional(folder / SETTINGS).get("added_tokens_decoder")
        for index, token in ({} if decoder is None else decoder).items():
            take(index, token["content"], token.get("special", True))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TokenizerError(
            f"{folder}: malformed added tokens", expected=f"{ADDED} and {SETTINGS} of transformers"
        ) from None
    return [(index, *added[index]) for index in sorted(added)]


def optional(path: Path) -> dict[str, Any]:
    """The JSON object in file `path`, an empty one where there is none. TokenizerError as of read_object."""
    return read_object(path, TokenizerError) if present(path) else {}


def disagreements(bos: int | None, eos: tuple[int, ...], named_bos: int | None, named_eos: int | None) -> list[str]:
    """Where the ids of config.json and generation_config.json (`bos`, `eos`) are not those of the tokenizer (`named`),
    and which of them is obeyed, as the official code does; for people."""
    notes = []
    if None not in (bos, named_bos) and bos != named_bos:
        notes.append(
            f"config.json: bos_token_id is {bos}, the tokenizer's BOS {named_bos}: a prompt begins with the latter"
        )
    if not eos and named_eos is not None:
        notes.append(f"no settings name an end token: an answer ends at {named_eos}, the tokenizer's EOS")
    if eos and named_eos is not None and named_eos not in eos:
        notes.append(f"an answer ends at token {' or '.join(map(str, eos))}, not at {named_eos}, the tokenizer's EOS")
    return notes
