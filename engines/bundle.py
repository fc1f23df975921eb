"""Opening a bundle folder, and writing one so that a half-written bundle never carries the final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from engines.errors import BundleError, ExportError
from engines.manifest import (
    BACKENDS,
    BLOCKS,
    FORMAT,
    ONNXRUNTIME,
    PARTS,
    PRECISIONS,
    File,
    Manifest,
    Plan,
    graph_io,
    is_template,
    kinds,
    plan_io,
    symbols,
)

MANIFEST = "bundle.json"
REBUILD = "python export/build.py --model CHECKPOINT --out {path}"
_CHUNK = 4 << 20


class Bundle:
    """An opened bundle: `manifest` (checked) and `path`."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Read and check `path`/bundle.json, then the size of every file it lists and, with `verify`, its SHA-256.

        Raises BundleError. `verify=False` skips the hashes alone (13 GB take about 10 s).
        """
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        for name, file in self.manifest.files.items():
            self._check(name, file, verify)

    def file(self, name: str) -> Path:
        """Path of a file the manifest lists."""
        return self.path / name

    def graph(self, part: str, kind: str) -> Path:
        """The .onnx file of a part ("vision", "pages", "decoder") of a kind; BundleError if there is none."""
        graphs = self.manifest.parts[part].graphs
        if kind not in graphs:
            raise BundleError(
                f"{self.path} holds no {kind} graph of {part}",
                expected=f"one of {sorted(graphs)}",
                fix=REBUILD.format(path=self.path),
            )
        return self.file(graphs[kind].file)

    def _check(self, name: str, file: File, verify: bool) -> None:
        path, fix = self.file(name), f"copy the bundle again, or rebuild it: {REBUILD.format(path=self.path)}"
        if not path.is_file():
            raise BundleError(f"{path} is missing", expected=f"a file of {file.bytes} bytes", fix=fix)
        size = path.stat().st_size
        if size != file.bytes:
            raise BundleError(f"{path} has {size} bytes", expected=f"{file.bytes} bytes", fix=fix)
        if verify and (digest := sha256(path)) != file.sha256:
            raise BundleError(f"{path} was changed: SHA-256 {digest}", expected=file.sha256, fix=fix)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    rebuild = f"rebuild it: {REBUILD.format(path=folder)}"
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)["format"]
    except (FileNotFoundError, NotADirectoryError):
        what = f"no {MANIFEST} in {folder}" if folder.is_dir() else f"no bundle folder {folder}"
        raise BundleError(
            what, expected="a folder written by export/build.py", fix=REBUILD.format(path=folder)
        ) from None
    except OSError as error:  # no permission, a name too long
        raise BundleError(f"{str(path)[:200]} cannot be read: {error.strerror}", expected="a bundle folder") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is no manifest: {error!r}", expected="JSON with a `format`", fix=rebuild) from error
    if found is True or found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        fix = "upgrade this project, or rebuild the bundle with this version" if newer else rebuild
        raise BundleError(f"{path} has format {found!r}", expected=f"format {FORMAT}", fix=fix)
    try:
        manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: {where}: {first['msg']}", expected="a manifest as written", fix=rebuild) from error
    try:
        problem = _contradiction(manifest)
    except (ArithmeticError, ValueError, IndexError) as error:  # sizes no model has, such as a patch of 0
        problem = f"impossible geometry ({error})"
    if problem:
        raise BundleError(f"{path}: {problem}", expected="a manifest as written", fix=rebuild)
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What in a well-formed manifest does not fit together, or None."""
    g = manifest.geometry
    if manifest.precision not in PRECISIONS:
        return f"precision {manifest.precision!r}, expected one of {list(PRECISIONS)}"
    sizes = BLOCKS.get(manifest.precision, (None,))
    if manifest.block_size not in sizes:
        return f"block size {manifest.block_size} with {manifest.precision}, expected {' or '.join(map(str, sizes))}"
    if manifest.backend not in BACKENDS:
        return f"backend {manifest.backend!r}, expected one of {list(BACKENDS)}"
    if not 0 <= manifest.page_budget <= g.pages:
        return f"page_budget {manifest.page_budget}, expected 0 .. {g.pages}"
    if list(manifest.parts) != list(PARTS):
        return f"parts {list(manifest.parts)}, expected {list(PARTS)}"
    if not is_template(manifest.prompt.template):
        return f"prompt template {manifest.prompt.template!r}, expected one <image> and one {{prompt}}"
    if manifest.scales and manifest.precision not in BLOCKS:
        return f"scales with {manifest.precision}, which has no quantised weights"
    named = [file for file in (manifest.prompt.tokenizer, manifest.kernels, manifest.scales) if file]
    for name, part in manifest.parts.items():
        named += [part.weights, *(graph.file for graph in part.graphs.values())]
        named += [plan.file for plan in part.plans.values()]
        if sorted(part.graphs) != sorted(kinds(name, g)):
            return f"graphs of {name}: {sorted(part.graphs)}, expected {sorted(kinds(name, g))}"
        for kind, graph in part.graphs.items():
            if (graph.inputs, graph.outputs) != graph_io(name, kind, g, manifest.precision):
                return f"inputs and outputs of the {kind} graph of {name} are not those of its geometry"
        for backend, plan in part.plans.items():
            if problem := _contradiction_of_plan(manifest, name, backend, plan):
                return f"the {backend} engine of {name}: {problem}"
        if part.plans.keys() != manifest.parts[PARTS[0]].plans.keys():
            return f"engines of {name} for {sorted(part.plans)}, of others for {sorted(manifest.parts[PARTS[0]].plans)}"
    outside = [name for name in manifest.files if Path(name).name != name]
    if outside:
        return f"lists {outside[0]!r}, expected names of files inside the bundle"
    unlisted = [name for name in named if name not in manifest.files]
    return f"{unlisted[0]!r} is used but not among the files" if unlisted else None


def _contradiction_of_plan(manifest: Manifest, part: str, backend: str, plan: Plan) -> str | None:
    if backend not in BACKENDS or backend == ONNXRUNTIME:
        return f"expected one of {[name for name in BACKENDS if name != ONNXRUNTIME]}"
    if (plan.inputs, plan.outputs) != plan_io(part, manifest.geometry, manifest.precision):
        return "inputs and outputs are not those of its geometry"
    if not plan.sms or min(plan.sms) < 50:
        return f"compute capabilities {list(plan.sms)}, expected numbers such as 86"
    if not plan.profiles:
        return "no optimisation profile"
    for profile in plan.profiles:
        if set(profile.sizes) != set(symbols(plan.inputs)):
            return f"profile {profile.name} has sizes of {sorted(profile.sizes)}"
        if any(not 0 < low <= best <= high for low, best, high in profile.sizes.values()):
            return f"profile {profile.name} has sizes {profile.sizes}, expected 0 < minimum <= optimum <= maximum"
    if plan.plugins and part != "decoder":
        return "needs plugins, which only a decoder does"
    kernels = manifest.files[manifest.kernels].sha256 if manifest.kernels in manifest.files else None
    if plan.plugins != (plan.kernels is not None) or (plan.plugins and plan.kernels != kernels):
        return f"built with kernels {plan.kernels}, the bundle's are {kernels}"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json, whole or not at all."""
    temporary = folder / f".{MANIFEST}-{os.getpid()}"
    temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    temporary.replace(folder / MANIFEST)


class BundleWriter:
    """Files written through this object are hashed on the way and listed in the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, File] = {}

    def write(self, name: str, chunks: Iterator[bytes], progress: Callable[[int], None] | None = None) -> None:
        """Write a file from chunks; `progress` is told the bytes of each."""
        digest, size = hashlib.sha256(), 0
        with open(self.folder / name, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if progress:
                    progress(len(chunk))
        self.files[name] = File(size, digest.hexdigest())

    def add(self, name: str) -> None:
        """List a file that something else wrote into the folder."""
        path = self.folder / name
        self.files[name] = File(path.stat().st_size, sha256(path))

    def finish(self, manifest: Manifest) -> None:
        """Write bundle.json, last."""
        write_manifest(self.folder, manifest)


@contextmanager
def write_bundle(out: Path) -> Iterator[BundleWriter]:
    """A writer into a temporary folder beside `out`, renamed to `out` when the block succeeds, deleted when it fails.

    A bundle at `out` is replaced, and stays as it is when anything fails. Whatever else is there is never touched: an
    ExportError before the block begins. Errors of the file system in the block, a full disk say, are ExportErrors too.
    """
    out = out.resolve()  # a link to a bundle stays a link
    _require_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"cannot write to {out.parent}: {error.strerror}", fix="choose another --out") from error
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would lock other users out of the finished bundle
        yield BundleWriter(folder)
        _put_in_place(folder, out)
    except OSError as error:
        free = shutil.disk_usage(out.parent).free
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ExportError(
            f"writing {out} failed: {error.strerror or error} ({free / 1e9:.1f} GB free)",
            fix="free disk space or choose another --out" if full else "choose another --out",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_replaceable(out: Path) -> None:
    """ExportError unless `out` is nothing, an empty folder, or a bundle and nothing but a bundle."""

    def refuse(what: str, fix: str = "choose another --out") -> None:
        raise ExportError(f"{out} {what}", expected="nothing there, an empty folder, or a bundle to replace", fix=fix)

    if not out.exists():
        return
    if not out.is_dir():
        refuse("is a file")
    if out.is_mount() or out == Path.cwd() or out in Path.cwd().parents:
        refuse("is the current folder or a mount point, which cannot be replaced", "choose a folder inside it")
    entries = {path.name for path in out.iterdir()}
    if not entries:
        return
    try:
        listed = set(_read_manifest(out).files) | {MANIFEST}
    except BundleError as error:
        refuse(f"is not empty and no bundle of this version: {error.found}", "choose another --out, or remove it")
    if entries - listed:
        refuse(f"holds more than a bundle: {sorted(entries - listed)[0]}", "choose another --out, or move that away")


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old bundle there is set aside first and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name(f"{folder.name}-old")
    out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
