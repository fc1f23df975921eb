"""A model's folder: what it is when it is none, and which of its weight files and tensors count."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from engines.errors import CheckpointError
from export.checkpoint.formats.key_table import DAMAGED, TABLE_LIMIT, TensorInfo
from export.checkpoint.formats.safetensors import read_safetensors
from export.checkpoint.formats.torch_save import read_torch
from plugins.files import read_file, read_json

Reader = Callable[[Path], dict[str, TensorInfo]]
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")  # of files that look like weights
INDEX = ".index.json"
_KINDS: tuple[tuple[str, Reader], ...] = (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch))
_LOOSE: tuple[tuple[str, Reader], ...] = (
    (r"(?!adapter_model|\.).*\.safetensors", read_safetensors),
    (r"pytorch_model.*\.bin", read_torch),
)
_SHARD = re.compile(r"-(\d{1,9})-of-(\d{1,9})$")
_PLAIN = re.compile(r"[^/\\:\0]{1,255}")  # a file in the folder itself, on every system

_FOLDER = "a folder with config.json and weights in the official layout"
_NAME_ONE = "name one with --model, or run this in the project's folder, where the default model lies"
_WHOLE = "name the folder of the whole model: a fine-tuned model of the second stage"
_NOT_BACK = "use the checkpoint it was made from: it has its numbers rounded, and no hi-res projections by their names"
_ADAPTER = re.compile(r"\.(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|ia3_l|base_layer|modules_to_save)\b")
_PORT = "use the checkpoint as it was trained, in the layout of the LLaVA repository"
_WRAPPERS = (
    ("module.", "a model saved inside DistributedDataParallel or DeepSpeed", None),
    ("_orig_mod.", "a model saved inside torch.compile", None),
    ("_fsdp_wrapped_module.", "a model saved inside FSDP", None),
    ("base_model.model.", "a model saved inside PEFT", None),
    ("language_model.", "transformers' own port of LLaVA, which has no hi-res projections", _PORT),
    ("model.language_model.", "transformers' own port of LLaVA, which has no hi-res projections", _PORT),
)


class Listing(NamedTuple):
    """tensors: by name. unread: weight files that are not read, and tensors (`FILE: NAME`) of files that are; why."""

    tensors: dict[str, TensorInfo]
    unread: dict[str, str]


# What a folder or a path is instead of a model.


def require_model_folder(path: Path) -> None:
    """CheckpointError, which says what helps, unless `path` is a folder that may hold a model: for a name on the
    Hugging Face Hub, a path of another system, a single file, and what `require_whole_weights` refuses."""
    text = str(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero character
        raise _no_folder(text, path, error) from None
    if stat.S_ISDIR(mode):
        if {"snapshots", "blobs"} <= set(names_in(path)):
            revisions = names_in(path / "snapshots")
            with suppress(CheckpointError):  # only advice depends on it
                main = read_file(path / "refs" / "main", CheckpointError).decode("ascii", "replace").strip()
                revisions = [main] if main in revisions else revisions
            raise CheckpointError(
                f"{text:.200} is a repository in the Hugging Face cache",
                expected=_FOLDER,
                fix=f"--model {path / 'snapshots' / revisions[0]}" if revisions else "complete the download",
            )
        require_whole_weights(path)
    elif text.endswith(".gguf"):
        raise CheckpointError(f"{text:.200} is a file of llama.cpp (GGUF)", expected=_FOLDER, fix=_NOT_BACK)
    elif stat.S_ISREG(mode):
        raise CheckpointError(
            f"{text:.200} is a file", expected=_FOLDER, fix=f"name the folder it is in: --model {path.parent}"
        )
    else:
        raise CheckpointError(f"{text:.200} is neither a folder nor a file", expected=_FOLDER, fix=_NAME_ONE)


def _no_folder(text: str, path: Path, error: Exception) -> CheckpointError:
    """What a path that leads nowhere is."""
    hub = re.fullmatch(r"(?:(?:https?|hf):/+(?:(?:www\.)?(?:huggingface\.co|hf\.co)/)?)?([\w.-]+/[\w.-]+)(/.*)?", text)
    address = text.startswith(("http:", "https:", "hf:"))
    if os.name != "nt" and ("\\" in text or re.match(r"[A-Za-z]:", text)):
        return CheckpointError(
            f"no checkpoint folder {text:.200}: this is a path of Windows, and this system has none",
            expected=_FOLDER,
            fix=r"under WSL, C:\models\x is /mnt/c/models/x (wslpath prints it); elsewhere copy the folder over",
        )
    local = text.startswith((".", "checkpoints/"))  # the default model's place, seen from another folder
    if hub and (address or not (hub[2] or Path(text).parent.exists() or local)):
        name = hub[1]
        place = f"checkpoints/{name.rpartition('/')[2]}"
        return CheckpointError(
            f"no checkpoint folder {text:.200}: it looks like a name on the Hugging Face Hub; builds download nothing",
            expected=_FOLDER,
            fix=f"hf download {name} --local-dir {place}, and then --model {place}",
        )
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return CheckpointError(f"{text:.200} is a link to {path.readlink()!s:.200}, which is not there", fix=_NAME_ONE)
    why = "" if isinstance(error, FileNotFoundError) else f": {getattr(error, 'strerror', None) or error}"
    return CheckpointError(f"no checkpoint folder {text:.200}{why}", expected=_FOLDER, fix=_NAME_ONE)


def require_whole_weights(folder: Path) -> None:
    """CheckpointError, which says what helps, for a folder whose weights are an adapter, a projector alone, what a
    training run keeps to go on (DeepSpeed, FSDP), or in a format that leads nowhere from here.

    Looks at names alone; a folder without any weights passes."""
    names = names_in(folder)
    whole = [name for name in names if any(re.fullmatch(pattern, name) for pattern, _ in _LOOSE)]
    whole += [name for name in names if name in {kind + INDEX for kind, _ in _KINDS}]

    def having(pattern: str) -> list[str]:
        return [name for name in names if re.fullmatch(pattern, name)]

    adapter = having(r"adapter_model.*\.(safetensors|bin)") or having(r"non_lora_trainables\.bin")
    if whole and adapter:
        raise CheckpointError(
            f"{folder}: {adapter[0]} beside {whole[0]}: which of them counts?",
            expected="one model's whole weights",
            fix=f"move {adapter[0]} away if it is merged into the weights already; if not, {_merge(folder)}",
        )
    if whole:
        return
    adapter = adapter or having(r"adapter_config\.json")
    if adapter:
        raise CheckpointError(
            f"{folder}: no weight files, only a LoRA adapter ({adapter[0]})",
            expected="one model's whole weights",
            fix=_merge(folder),
        )
    # Not zero_to_fp32.py: it stays beside merged weights, and a download may have brought it alone.
    states = having(r"global_step\d+|.*_(model|optim)_states\.pt")
    if states:
        raise CheckpointError(
            f"{folder}: no weight files, only the states of a DeepSpeed training run ({states[0]})",
            expected=_FOLDER,
            fix=_merge_zero(folder, "zero_to_fp32.py" in names),
        )
    parts = having(r".*\.distcp|\.metadata|pytorch_model_fsdp_\d+")
    if parts:
        inside = folder / parts[0] if parts[0].startswith("pytorch_model_fsdp") else folder
        raise CheckpointError(
            f"{folder}: no weight files, only a distributed checkpoint (FSDP, {parts[0]})",
            expected=_FOLDER,
            fix=f"accelerate merge-weights {inside} MERGED, or mkdir MERGED && "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {inside} MERGED/pytorch_model.bin; then "
            "copy config.json and the tokenizer's files into MERGED",
        )
    for pattern, what, fix in (
        (r".*\.gguf", "weights of llama.cpp (GGUF)", _NOT_BACK),
        (r"mm_projector\.bin", "a projector, what LLaVA's first stage of training saves", _WHOLE),
        (r".*\.(h5|msgpack)", "weights of TensorFlow or Flax", "save them as safetensors with transformers"),
        (r".*\.(pth|pt|ckpt)", "files of another layout", "save the model with save_pretrained"),
    ):
        found = having(pattern)
        if found:
            raise CheckpointError(
                f"{folder}: no weight files, only {what} ({found[0]})", expected="model.safetensors", fix=fix
            )


def _merge(folder: Path) -> str:
    """How an adapter becomes a model."""
    base = "BASE"
    with suppress(CheckpointError):  # only advice depends on it
        content = read_json(folder / "adapter_config.json", CheckpointError)
        named = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        base = named if isinstance(named, str) and re.fullmatch(r"[\w./-]{1,200}", named) else base
    return (
        "merge the adapter into its base model first, in the repository it was trained with: "
        f"python scripts/merge_lora_weights.py --model-path {folder} --model-base {base} --save-model-path MERGED"
    )


def _merge_zero(folder: Path, has_script: bool) -> str:
    """How the states of ZeRO become a model; the script, which DeepSpeed puts beside them, has two usages."""
    if not has_script:
        above = re.fullmatch(r"global_step\d+", folder.name) and "zero_to_fp32.py" in names_in(folder.parent)
        return (
            f"name the folder above, {folder.parent}, for what to do"
            if above
            else "merge them with the zero_to_fp32.py that DeepSpeed puts beside them"
        )
    script = b""
    with suppress(CheckpointError):  # only advice depends on it
        script = read_file(folder / "zero_to_fp32.py", CheckpointError)
    if b"output_dir" in script:
        what = "python zero_to_fp32.py . merged, then copy config.json and the tokenizer's files into merged"
    else:
        what = "python zero_to_fp32.py . pytorch_model.bin"
    return f"cd {folder} && {what}"


def require_plain_names(folder: Path, names: Iterable[str]) -> None:
    """CheckpointError, which says what helps, for tensors of an adapter that is not merged, and for names of a wrapper
    (DistributedDataParallel, torch.compile, PEFT) or of transformers' own port of LLaVA."""
    names = list(names)
    adapters = [name for name in names if _ADAPTER.search(name)]
    if adapters:
        raise CheckpointError(
            f"{folder}: {len(adapters)} tensors of an adapter such as {adapters[0]}: it changes the layers",
            expected="weights into which adapters are merged",
            fix=_merge(folder),
        )
    for prefix, what, fix in _WRAPPERS:
        found = [name for name in names if name.startswith(prefix)]
        if found:
            raise CheckpointError(
                f"{folder}: {len(found)} of {len(names)} keys begin with {prefix!r}: {what}; the first is {found[0]}",
                expected="the official names, model.layers.0. ...",
                fix=fix or _strip(folder, prefix),
            )


def _strip(folder: Path, prefix: str) -> str:
    """The command that takes a prefix away, in the files and in their index if there is one."""
    names = names_in(folder)
    if any(name.endswith(".safetensors") for name in names):
        library, load, save, pattern = "safetensors.torch as s", "s.load_file(f)", "s.save_file", "*.safetensors"
    else:
        library, load, save, pattern = "torch", "torch.load(f, weights_only=True)", "torch.save", "pytorch_model*.bin"
    dots = prefix.replace(".", "[.]")
    index = f" && sed -i 's/\"{dots}/\"/g' *{INDEX}" if any(name.endswith(INDEX) for name in names) else ""
    return (
        f"save the state dict of the model inside the wrapper; or take the prefix away: cd {folder} && "
        f'python -c "import os, {library}; from glob import glob; '
        f"[({save}({{k.removeprefix('{prefix}'): v for k, v in {load}.items()}}, f + '.new'), "
        f"os.replace(f + '.new', f)) for f in glob('{pattern}')]\"{index}"
    )


# Which files count.


def names_in(folder: Path) -> list[str]:
    """What lies in `folder`, sorted, links that lead nowhere included. CheckpointError if it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}", expected="a readable folder") from None


def weights_in(folder: Path) -> list[str]:
    """The names in `folder` that look like weight files or their index."""
    return [name for name in names_in(folder) if name.endswith(SUFFIXES)]


def read_folder(folder: Path) -> Listing | None:
    """The tensors of a Hugging Face model folder, or None if it has no weight files.

    Looks for, in the order of transformers' from_pretrained: model.safetensors, its index, pytorch_model.bin, its
    index; then, without an index, every *.safetensors that is no adapter, every pytorch_model*.bin. What is there
    but cannot be read is an error, not a reason to look further. Raises CheckpointError for a missing, truncated,
    damaged or unsafe file, an index that does not match or leads out of the folder, and shards without an index that
    are incomplete or hold a key twice.
    """
    names = names_in(folder)
    for name, reader in _KINDS:
        if name in names:
            return Listing(reader(folder / name), _others(names, {name}, f"{name} comes first"))
        if name + INDEX in names:
            return _read_indexed(folder, name + INDEX, names, reader)
    for pattern, reader in _LOOSE:
        used = [name for name in names if re.fullmatch(pattern, name)]
        if used:
            odd = next((name for name in used if not name.isprintable()), None)
            if odd is not None:
                raise CheckpointError(f"{folder}: a file is called {odd!a:.80}", fix="rename it to text")
            why = f"{used[0]} comes first" if len(used) == 1 else f"{used[0]} and {len(used) - 1} more come first"
            return Listing(_read_all([folder / name for name in used], reader), _others(names, {*used}, why))
    return None


def _others(names: list[str], used: set[str], why: str) -> dict[str, str]:
    others = [name for name in names if name.endswith(SUFFIXES) and name not in used]
    return {name if name.isprintable() else ascii(name): f"file not read: {why}" for name in others}


def _read_all(files: list[Path], reader: Reader) -> dict[str, TensorInfo]:
    for file in files:
        numbers = _SHARD.search(file.stem)
        present = numbers and len([other for other in files if other.stem.endswith(f"-of-{numbers[2]}")])
        if numbers and present != int(numbers[2]):
            raise CheckpointError(
                f"{file.parent}: {present} of {int(numbers[2])} shards like {file.name}, and no index",
                expected="every shard",
                fix="download the missing shards",
            )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found = reader(file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{twice[0]} is in {tensors[twice[0]].file.name} and in {file.name}",
                expected="every key once, or an index that says which file counts",
                fix="keep the files of one checkpoint in the folder",
            )
        tensors.update(found)
    return tensors


def _read_indexed(folder: Path, index: str, names: list[str], reader: Reader) -> Listing:
    """From every file only the tensors that the index places there: others are copies that a later save replaced."""
    files = _weight_map(folder / index)
    tensors: dict[str, TensorInfo] = {}
    unread = _others(names, {index, *files.values()}, f"{index} does not name it")
    for file in sorted(set(files.values())):
        needed = [key for key in files if files[key] == file]
        if file not in names:
            raise CheckpointError(
                f"{folder / file}: shard is missing, with {len(needed)} keys such as {needed[0]}",
                expected=f"every shard that {index} names",
                fix="download the missing shard",
            )
        found = reader(folder / file)
        absent = [key for key in needed if key not in found]
        if absent:
            raise CheckpointError(
                f"{folder / file}: key {absent[0]} is missing ({len(absent)} keys in all)",
                expected=f"the keys that {index} places in this file",
                fix="index and shards come from different saves: download or save the folder again",
            )
        for key, info in found.items():
            if files.get(key) == file:
                tensors[key] = info
            else:
                place = f"places it in {files[key]}" if key in files else "does not name it"
                unread[f"{file}: {key}"] = f"stale: {index} {place}"
    return Listing(tensors, unread)


def _weight_map(path: Path) -> dict[str, str]:
    """File by tensor, from an index. Its total_size is not compared: tools that merge or convert leave it as it was,
    and it changes nothing of what is read."""

    def wrong(found: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: not a shard index: {found}",
            expected='a JSON object with a "weight_map" of key: file, each a file in this folder',
            fix=DAMAGED,
        )

    try:
        content: Any = read_json(path, CheckpointError, limit=TABLE_LIMIT, fix=DAMAGED)
    except CheckpointError as error:
        raise wrong(error.found) from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise wrong("no weight_map, or an empty one")
    for key, file in files.items():
        if not isinstance(file, str) or not file.isprintable() or not _PLAIN.fullmatch(file) or file in (".", ".."):
            raise wrong(f"it places {key!a:.80} in {file!a:.80}")
    return files
