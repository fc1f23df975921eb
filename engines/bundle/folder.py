"""Opening a bundle folder: its manifest checked against itself, its files against the manifest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from engines.bundle.kinds import BACKENDS, ONNXRUNTIME, PARTS, kinds
from engines.bundle.manifest import FORMAT, File, Manifest, Plan, is_template
from engines.bundle.precision import PRECISIONS, Precision
from engines.bundle.specs import graph_io, plan_io, symbols
from engines.errors import BundleError

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
        self.manifest = read_manifest(self.path)
        for name, file in self.manifest.files.items():
            self._check(name, file, verify)

    @property
    def precision(self) -> Precision:
        """What the manifest's name of a precision means."""
        return PRECISIONS[self.manifest.precision]

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


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
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
    precision = PRECISIONS[manifest.precision]
    sizes = precision.block_sizes or (None,)
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
    if manifest.scales and not precision.quantises:
        return f"scales with {manifest.precision}, which has no quantised weights"
    named = [file for file in (manifest.prompt.tokenizer, manifest.kernels, manifest.scales) if file]
    for name, part in manifest.parts.items():
        named += [part.weights, *(graph.file for graph in part.graphs.values())]
        named += [plan.file for plan in part.plans.values()]
        if sorted(part.graphs) != sorted(kinds(name, g)):
            return f"graphs of {name}: {sorted(part.graphs)}, expected {sorted(kinds(name, g))}"
        for kind, graph in part.graphs.items():
            if (graph.inputs, graph.outputs) != graph_io(name, kind, g, precision):
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
    if (plan.inputs, plan.outputs) != plan_io(part, manifest.geometry, PRECISIONS[manifest.precision]):
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
