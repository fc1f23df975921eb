"""The checkpoint's tokenizer as a `tokenizer.json` for the Rust `tokenizers` library.

The official code uses the slow LLaMA tokenizer: SentencePiece, with a dummy space before every encoded text. So
SentencePiece itself decides what is right, and every conversion is compared with it. The result has no post-processor:
whoever encodes adds BOS, and encodes every part of a prompt around `<image>` alone, as the official code does.

In a conversation there are special tokens inside a text: "</s>" behind every answer. The slow tokenizer encodes what is
between them piece by piece. With `legacy` of tokenizer_config.json, which it takes for true when it is absent, each has
the dummy space before it ("</s>USER" becomes "</s>", "\u2581USER"); without, only one at the beginning of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.checks import shown
from engines.errors import TokenizerError
from engines.tokenizer_file import read_tokenizer_file
from export.checkpoint.settings import present
from export.checkpoint.special_tokens import SpecialTokens, added_tokens, read_special_tokens
from plugins.files import read_file

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

_SPACE = "\u2581"  # SentencePiece writes spaces as this character
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # piece types of sentencepiece_model.proto that LLaMA models use
_BPE = 2  # model type of sentencepiece_model.proto
_PIECE = 1_000  # characters of a piece; SentencePiece makes 16 at most. Merges are sought at every place in it
_LIMIT = 256 << 20  # bytes of a tokenizer's file; that of 256,000 tokens with their merges has 35 MB

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


# Characters that a vocabulary without bytes and without an unknown token has no token for: one of them at least.
_RARE = ("\U0001f600", "\u4f60", "\u0905", "\U00010348")


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A checkpoint's tokenizer: `content` of a tokenizer.json, the ids of its BOS (None: a prompt has none) and EOS,
    and `notes` on what was left out or is not obeyed, for people."""

    content: bytes
    bos_id: int | None
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read_tokenizer(folder: Path, vocab: int) -> CheckpointTokenizer | None:
    """The tokenizer of the checkpoint folder `folder`, whose model has `vocab` token ids. Writes nothing.

    A `tokenizer.json` is taken over if no `tokenizer.model` contradicts it; otherwise `tokenizer.model` is converted,
    as the official code reads only that. Returns None if the folder has neither: such models take token ids only.
    A pad token right behind the vocabulary is left out: the official code makes a row for it, which no prompt reads.
    Raises TokenizerError for an unreadable or unsupported file, settings that contradict each other, a token id outside
    the vocabulary, and a conversion that does not encode and decode every text of `BATTERY` as SentencePiece does.
    """
    folder = Path(folder)
    fast_file, slow_file = folder / "tokenizer.json", folder / "tokenizer.model"
    notes: list[str] = []
    settings = read_special_tokens(folder)
    fast = _load_fast(fast_file, settings, vocab, notes) if present(fast_file) else None
    slow = _load_slow(slow_file) if present(slow_file) else None
    with _contained(fast_file):
        agrees = fast is not None and (slow is None or not difference(fast, slow, settings.legacy))
    if fast is not None and agrees:
        tokenizer, source = fast, fast_file
    elif slow is not None:
        notes.clear()  # on the other file
        tokenizer, source = _convert(slow, slow_file, settings, vocab, notes), slow_file
        problem = difference(tokenizer, slow, settings.legacy)
        if problem:
            raise TokenizerError(
                f"{slow_file}: does not survive the conversion: {problem}",
                expected="the same token ids and texts as SentencePiece",
                fix="put a tokenizer.json that was made for this model into the folder, without tokenizer.model",
            )
    else:
        return None
    with _contained(source):
        _check_vocabulary(tokenizer, source, vocab)
        notes += _check_texts(tokenizer)
        bos, eos = (_special_id(tokenizer, settings, kind, folder) for kind in ("bos", "eos"))
        content = tokenizer.to_str(pretty=True).encode()
    if not settings.adds_bos:
        bos = None
    return CheckpointTokenizer(content, bos, () if eos is None else (eos,), (*settings.notes, *notes))


@contextmanager
def _contained(path: Path) -> Iterator[None]:
    """Whatever the Rust library throws about the file `path`: a plain Exception, or a panic, which is none."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(
            f"{path}: cannot be used ({error!s:.200})",
            expected="a tokenizer.json of the tokenizers library",
            fix=_again(path),
        ) from None


def _again(path: Path) -> str:
    """What helps where the tokenizer's file at `path` is none."""
    spare = path.suffix == ".json" and present(path.with_name("tokenizer.model"))
    return "download the file again" + (", or remove it to use tokenizer.model" if spare else "")


def _special_id(tokenizer: Tokenizer, settings: SpecialTokens, kind: str, folder: Path) -> int | None:
    """The id of the BOS or EOS ("bos", "eos"). TokenizerError when the settings name one that there is not."""
    text = getattr(settings, kind)
    index = tokenizer.token_to_id(text) if text is not None else None
    if index is None and kind in settings.named:
        raise TokenizerError(
            f"{folder}: {kind}_token is {shown(text)}, which the tokenizer does not have",
            expected="a token of its vocabulary",
            fix="use the tokenizer that belongs to these settings",
        )
    return index


def _check_texts(tokenizer: Tokenizer) -> list[str]:
    """Encode and decode every text of `BATTERY`; notes on characters that a question cannot have. Whatever the library
    throws comes out, but for a missing unknown token: such a tokenizer serves all texts of its own alphabet."""

    def ids(text: str) -> list[int] | None:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # a panic is none, and comes out
            if "unk" not in str(error).lower():
                raise
            return None

    for text in BATTERY:
        tokenizer.decode(ids(text) or [])
    encoded = {text: ids(text) for text in _RARE}
    if any(found is None for found in encoded.values()):
        return ["the tokenizer has no unknown token: a question with a character that it has no token for is refused"]
    if any(not found for found in encoded.values()):
        return ["the tokenizer has no unknown token: characters that it has no token for are left out of a question"]
    return []


def difference(tokenizer: Tokenizer, truth: SentencePieceProcessor, legacy: bool) -> str | None:
    """The first text of `BATTERY` that `tokenizer` encodes or decodes unlike SentencePiece, alone or behind a special
    token (as the slow tokenizer does with this `legacy`), described; None if none.

    Texts with an added token in them are left out: SentencePiece knows nothing of those.
    """
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    special = next((token for token in map(truth.id_to_piece, _specials(truth)) if token in added), None)
    behind = truth if legacy else _without_prefix(truth)
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
        if special is not None:
            expected = [truth.piece_to_id(special), *behind.encode(text)]
            found = tokenizer.encode(special + text, add_special_tokens=False).ids
            if found != expected:
                said = f"SentencePiece, the special token apart, says {expected} (legacy is {str(legacy).lower()})"
                return f"{special + text!r} is encoded as {found}, {said}"
    return None


def _specials(truth: SentencePieceProcessor) -> list[int]:
    """Ids of the EOS and BOS that SentencePiece's model names itself."""
    return [index for index in (truth.eos_id(), truth.bos_id()) if index >= 0]


def _without_prefix(model: SentencePieceProcessor) -> SentencePieceProcessor:
    """The same model, that puts no dummy space before a text."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(model.serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _load_fast(path: Path, settings: SpecialTokens, vocab: int, notes: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer

    data, raw = read_tokenizer_file(path, fix=_again(path))
    with _contained(path):
        tokenizer = Tokenizer.from_buffer(data)
        for token in raw.get("added_tokens") or ():
            given = tokenizer.token_to_id(token["content"])
            if given != token["id"]:  # the library counts on behind its vocabulary, whatever the file says
                raise TokenizerError(
                    f"{path}: added token {shown(token['content'])} has id {shown(token['id'])}",
                    expected=f"id {given}: added tokens follow the vocabulary without gaps",
                )
        kept = [(index, token) for index, token in tokenizer.get_added_tokens_decoder().items() if index >= vocab]
        if [index for index, _ in kept] == [vocab] and settings.is_pad(kept[0][1].content):
            notes.append(_left_out(kept[0][1].content, vocab))
            raw = json.loads(tokenizer.to_str())
            raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] != vocab]
            tokenizer = Tokenizer.from_str(json.dumps(raw))
        tokenizer.no_truncation()  # left over from training; the runtime checks lengths itself
        tokenizer.no_padding()
    return tokenizer


def _load_slow(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    data = read_file(path, TokenizerError, limit=_LIMIT)
    try:
        if not data:  # which SentencePiece takes for none given
            raise ValueError("an empty file")
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise TokenizerError(
            f"{path}: cannot be used ({error!s:.200})", expected="a SentencePiece model", fix="download the file again"
        ) from None


def _left_out(text: str, index: int) -> str:
    return f"token {shown(text)}, id {index}, is left out: it pads batches, and the model has no row for it"


def _convert(
    slow: SentencePieceProcessor, path: Path, settings: SpecialTokens, vocab: int, notes: list[str]
) -> Tokenizer:
    """The SentencePiece model as a Rust tokenizer that treats text the same way."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = ModelProto.FromString(slow.serialized_model_proto())
    _check_kind(proto, path)
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(
        models.BPE(pieces, _merges(proto), unk_token=slow.id_to_piece(slow.unk_id()), fuse_unk=True, byte_fallback=True)
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    if settings.adds_space not in (None, prefix):
        raise TokenizerError(
            f"{path.parent}: add_prefix_space is {settings.adds_space}, add_dummy_prefix of {path.name} {prefix}",
            expected="the same in both",
            fix="remove add_prefix_space from tokenizer_config.json: the official code does not read it",
        )
    if not (prefix or settings.legacy):
        raise TokenizerError(
            f"{path.parent}: legacy is false, add_dummy_prefix of {path.name} too: not supported",
            expected="a model with add_dummy_prefix, as LLaMA's is: without legacy, the official code adds one itself",
            fix="remove legacy from tokenizer_config.json, if the model was trained without a space before its texts",
        )
    first = [normalizers.Prepend(_SPACE)] if prefix and settings.legacy else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    if prefix and not settings.legacy:
        # The library has no other step that knows where a text begins. There are no spaces left in it, so that the
        # first of the two puts one there even before a space (it does not before its own kind).
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False),
            ]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", left=1, right=0)] if prefix else [])
    )
    # The official tokenizer, too, reads these in the text as single tokens.
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    for index, content, is_special in added_tokens(path.parent):
        if index == vocab and settings.is_pad(content):
            notes.append(_left_out(content, index))
            continue
        if index not in range(len(proto.pieces)):
            token = AddedToken(content, normalized=False)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        given = tokenizer.token_to_id(content)
        if given != index:
            raise TokenizerError(
                f"{path.parent}: added token {shown(content)} has id {index}",
                expected=f"id {given}: added tokens are new and follow the {len(pieces)} pieces without gaps"
                if given is not None
                else f"{shown(tokenizer.id_to_token(index))}, the token of that id in {path.name}",
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
        (f"a piece of more than {_PIECE} characters", any(len(piece.piece) > _PIECE for piece in proto.pieces)),
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


def _check_vocabulary(tokenizer: Tokenizer, source: Path, vocab: int) -> None:
    text, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab:
        raise TokenizerError(
            f"{source}: token {shown(text)} has id {largest}",
            expected=f"ids below the model's vocab_size {vocab}",
            fix="use the tokenizer that belongs to this checkpoint",
        )
