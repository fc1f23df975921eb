"""The checkpoint's tokenizer as a `tokenizer.json` for the Rust `tokenizers` library.

The official code uses the slow LLaMA tokenizer: SentencePiece, with a dummy space before every encoded text. So
SentencePiece itself decides what is right, and every conversion is compared with it. The result has no post-processor:
whoever encodes adds BOS, and encodes every part of a prompt around `<image>` alone, as the official code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import TokenizerError
from export.checkpoint.settings import read_object

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

_SPACE = "\u2581"  # SentencePiece writes spaces as this character
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # piece types of sentencepiece_model.proto that LLaMA models use
_BPE = 2  # model type of sentencepiece_model.proto

# Texts on which a conversion must agree with SentencePiece: spaces, line ends, digits, prompts, scripts, byte fallback.
BATTERY = (
    *("", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "a  b   c"),
    *("0", "7", "42", "1234567890", "3.14159", "1,000,000", "-5 + 3 = -2", "room 101b"),
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: ",
    "\nWhat is written on the sign? ASSISTANT:",
    "\nAnswer the question using a single word or phrase. ASSISTANT:",
    *("USER: ", "ASSISTANT:", " </s", "<image>", "<0x0A>", "[INST] x [/INST]", "http://example.com/a?b=c&d=%20"),
    *("MiXeD CaSe", "ALLCAPS", "snake_case_name", "x" * 40, "for i in range(3):\n    print(i)\n", '{"k": [1, 2]}'),
    *("naïve café", "e\u0301 (combining)", "straße", "Привет", "你好、世界", "こんにちは", "مرحبا", "नमस्ते", "ﬁ ½ ™"),
    *("non\u00a0breaking", "zero\u200bwidth", "\ufeffmark", f"{_SPACE}a{_SPACE}"),
    *("😀", "ok 👍🏽 done", "👨\u200d👩\u200d👧", "\U00010348\ufffd"),
)


@dataclass(frozen=True)
class TokenizerInfo:
    """The written tokenizer."""

    file: str  # name in the output folder
    bos_id: int | None
    eos_ids: tuple[int, ...]


def convert_tokenizer(folder: Path, out: Path) -> TokenizerInfo | None:
    """Write `out/tokenizer.json` (the folder must exist) from the tokenizer of the checkpoint folder `folder`.

    A `tokenizer.json` is taken over if no `tokenizer.model` contradicts it; otherwise `tokenizer.model` is converted,
    as the official code reads only that. Returns None if the folder has neither: such models take token ids only.
    Raises TokenizerError for an unreadable or unsupported file, a token id outside the model's vocabulary, and a
    conversion that does not encode and decode every text of `BATTERY` as SentencePiece does; ConfigError for a broken
    JSON settings file beside them.
    """
    fast_file, slow_file = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer.model"
    fast = _load_fast(fast_file) if fast_file.is_file() else None
    slow = _load_slow(slow_file) if slow_file.is_file() else None
    if fast is not None and (slow is None or not difference(fast, slow)):
        tokenizer, source = fast, fast_file
    elif slow is not None:
        tokenizer, source = _convert(slow, slow_file), slow_file
        problem = difference(tokenizer, slow)
        if problem:
            raise TokenizerError(
                f"{slow_file}: does not survive the conversion: {problem}",
                expected="the same token ids and texts as SentencePiece",
                fix="put a tokenizer.json that was made for this model into the folder, without tokenizer.model",
            )
    else:
        return None
    _check_vocabulary(tokenizer, source)
    bos = _token_id(tokenizer, Path(folder), "bos_token", "<s>")
    eos = _token_id(tokenizer, Path(folder), "eos_token", "</s>")
    # The library's own save() raises a bare Exception on a full disk.
    (Path(out) / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return TokenizerInfo("tokenizer.json", bos, () if eos is None else (eos,))


def difference(tokenizer: Tokenizer, truth: SentencePieceProcessor) -> str | None:
    """The first text of `BATTERY` that `tokenizer` encodes or decodes unlike SentencePiece, described; None if none.

    Texts with an added token in them are left out: SentencePiece knows nothing of those.
    """
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in BATTERY:
        if any(token in text for token in added):
            continue
        expected = truth.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            return f"{text!r} is encoded as {found}, SentencePiece says {expected}"
        decoded = tokenizer.decode(expected)
        if decoded != truth.decode(expected):
            return f"{expected} is decoded as {decoded!r}, SentencePiece says {truth.decode(expected)!r}"
    return None


def _load_fast(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing more specific
        raise TokenizerError(
            f"{path}: cannot be loaded ({error})",
            expected="a tokenizer.json of the tokenizers library",
            fix="download the file again, or remove it to use tokenizer.model",
        ) from None
    tokenizer.no_truncation()  # left over from training; the runtime checks lengths itself
    tokenizer.no_padding()
    return tokenizer


def _load_slow(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise TokenizerError(
            f"{path}: cannot be loaded ({error})", expected="a SentencePiece model", fix="download the file again"
        ) from None


def _convert(slow: SentencePieceProcessor, path: Path) -> Tokenizer:
    """The SentencePiece model as a Rust tokenizer that treats text the same way."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = ModelProto.FromString(slow.serialized_model_proto())
    _check_kind(proto, path)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(proto), unk_token=slow.id_to_piece(slow.unk_id()), fuse_unk=True, byte_fallback=True)
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend(_SPACE)] if prefix else []) + [normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", left=1, right=0)] if prefix else [])
    )
    # The official tokenizer, too, reads these in the text as single tokens.
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    for index, content, is_special in _added_tokens(path.parent, len(vocab)):
        token = AddedToken(content, normalized=False)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        given = tokenizer.token_to_id(content)
        if given != index:
            raise TokenizerError(
                f"{path.parent}: added token {content!r} has id {index}",
                expected=f"id {given}: added tokens are new and follow the {len(vocab)} pieces without gaps",
            )
    return tokenizer


def _check_kind(proto: Any, path: Path) -> None:
    """Refuse SentencePiece models that are not built like LLaMA's: BPE over raw text, with bytes as the fallback."""
    spec = proto.normalizer_spec
    other_types = {piece.type for piece in proto.pieces} - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}
    unlike = [
        ("model type is not BPE", proto.trainer_spec.model_type != _BPE),
        ("byte fallback is off", not proto.trainer_spec.byte_fallback),
        ("text is normalised", bool(spec.precompiled_charsmap) or spec.remove_extra_whitespaces),
        ("spaces are not escaped", not spec.escape_whitespaces),
        ("user-defined or unused pieces", bool(other_types)),
    ]
    found = [text for text, holds in unlike if holds]
    if found:
        raise TokenizerError(
            f"{path}: unsupported SentencePiece model: {', '.join(found)}",
            expected="a LLaMA-style model: BPE with byte fallback and no normalisation",
            fix="put a tokenizer.json that was made for this model into the folder, without tokenizer.model",
        )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best first: SentencePiece joins the pair with the best score."""
    normal = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    ranked = []
    for text, index in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                ranked.append((-proto.pieces[index].score, index, normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _added_tokens(folder: Path, pieces: int) -> list[tuple[int, str, bool]]:
    """(id, text, special) of the tokens that the folder adds behind the SentencePiece vocabulary, by id."""
    added: dict[int, tuple[str, bool]] = {}
    try:
        for content, index in _optional(folder / "added_tokens.json").items():
            added[int(index)] = (content, True)
        for index, token in _optional(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            added[int(index)] = (str(token["content"]), bool(token.get("special", True)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TokenizerError(
            f"{folder}: malformed added tokens", expected="added_tokens.json and tokenizer_config.json of transformers"
        ) from None
    return [(index, *added[index]) for index in sorted(added) if index >= pieces]


def _check_vocabulary(tokenizer: Tokenizer, source: Path) -> None:
    size = _optional(source.parent / "config.json").get("vocab_size")
    text, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if isinstance(size, int) and largest >= size:
        raise TokenizerError(
            f"{source}: token {text!r} has id {largest}",
            expected=f"ids below the model's vocab_size {size}",
            fix="use the tokenizer that belongs to this checkpoint",
        )


def _token_id(tokenizer: Tokenizer, folder: Path, key: str, usual: str) -> int | None:
    """Id of the `key` ("bos_token") that the folder's settings name, else of the `usual` token of LLaMA models."""
    named = _optional(folder / "special_tokens_map.json") | _optional(folder / "tokenizer_config.json")
    token = named.get(key, usual)
    if isinstance(token, dict):  # a serialised AddedToken
        token = token.get("content")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
