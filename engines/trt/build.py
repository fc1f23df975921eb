"""Bundle -> TensorRT engines. Each is built in a process of its own (worker.py): an abort, a crash or the kernel's
out-of-memory killer then ends in an error that says so, and the bundle stays as it was.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from engines import errors
from engines.bundle.folder import Bundle, sha256
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import PLUGINS_ALONE, TENSORRT_RTX, needing_plugins
from engines.bundle.manifest import File, Link, Manifest, Part, Plan
from engines.bundle.pages import page_size
from engines.bundle.rebuild import apart_of, block_of, rebuild
from engines.bundle.specs import plan_io
from engines.bundle.tensors import APART
from engines.bundle.work import work_folder
from engines.bundle.writer import write_manifest
from engines.errors import BackendError, BundleError, FlexError, OptionError
from engines.memory import available_bytes
from engines.progress import progress
from engines.sizing.builder import BUILDER_FACTOR
from engines.sizing.fit import require_boards, require_sms
from engines.sizing.needs import Configuration
from engines.trt import library as trt
from engines.trt.kept import Kept
from engines.trt.options import EngineOptions, command
from engines.trt.tasks import Task, tasks_of
from engines.trt.worker import Built, Job
from plugins import child
from plugins.artifacts import Artifacts
from plugins.compiler.ptxas import SMS
from plugins.errors import KernelError
from plugins.registry import OPS, kernels_of_model

logger = logging.getLogger(__name__)
FEWER_LAYERS = "--layers-per-engine with fewer layers takes less"
KILLED = 9  # the signal; not every system has a name for it


def sms_to_build(options: EngineOptions) -> tuple[int, ...]:
    """The SMs an engine made here would run on. BackendError or OptionError when it cannot be made here."""
    trt.load(options.backend)
    if options.backend == TENSORRT_RTX:
        return tuple(sorted(options.sms))
    from engines.cuda import Cuda

    own = Cuda().sm
    if options.targets not in (None, (own,)):
        raise OptionError(
            f"target {', '.join(f'sm_{sm}' for sm in options.targets)}, this machine's GPU is sm_{own}",
            expected="the GPU of this machine: TensorRT builds for no other",
            fix="build on the board itself: python -m engines.build BUNDLE --backend tensorrt",
        )
    return (own,)


def elsewhere(options: EngineOptions) -> str | None:
    """Why the engines cannot be built on this machine but on a board; None if they can. BackendError when TensorRT-RTX,
    which builds for other GPUs, is missing, or when this machine is the board, but its TensorRT too old."""
    try:
        sms_to_build(options)
    except FlexError as error:
        if options.backend == TENSORRT_RTX:
            raise
        return f"{error.found}; engines of tensorrt are built on the machine that runs them"
    trt.require_operators(options.backend, plugins=options.plugins)
    return None


def attributes(g: Geometry) -> dict[str, int]:
    """What the ops of a model have as attributes, and their kernels are compiled for."""
    made = {"page_size": page_size(g), "page_slots": int(g.page_slots is not None)}
    names = {name for op in OPS.values() for name in op.attribute_names} - made.keys()
    return {name: int(getattr(g, name)) for name in sorted(names)} | made


def build_engines(
    folder: Path,
    options: EngineOptions,
    *,
    name: Path | None = None,
    make_default: bool = False,
    quiet: bool = False,
    warned: bool = False,
) -> Bundle:
    """Build the engines of every part into the bundle in `folder`, in place of older ones for the same backend.

    `name`: what messages and logs call the folder, when it is a temporary one. `make_default`: the runtime opens these
    engines unless told otherwise. `quiet`: no picture of the progress; what else there is to say is logged.
    `warned`: what boards and GPUs have to be told was said before. A failed build changes nothing; its log stays beside
    the bundle, and so do the engines it has finished, unless the bundle itself is temporary: the next build takes
    those that are what it would build. Raises a FlexError.
    """
    there = folder.resolve()
    kept = Kept(there.with_name(f"{there.name}.{options.backend}.unfinished") if name is None else None)
    bundle, name = Bundle(folder, verify=False), Path(name or folder)
    manifest = bundle.manifest
    if not options.plugins and (only := needing_plugins(manifest.geometry)):
        why = "; ".join(why for option, why in PLUGINS_ALONE.values() if option in only)
        raise OptionError(
            f"{name} was built with {' and '.join(only)}: TensorRT alone {why}",
            expected="plugins",
            fix="leave out --no-plugins, or build the bundle without",
        )
    sms = sms_to_build(options)
    trt.require_operators(options.backend, plugins=options.plugins)
    asked = _configuration(bundle, options)
    again = partial(_again, manifest, name, options)
    for warning in (*require_boards(asked, options.boards, again), *require_sms(asked, sms, again)):
        if not warned:
            logger.warning(warning)
    kernels = _require_kernels(bundle, name, options, sms)
    try:
        with work_folder(there) as temporary:
            parts, files, moves = dict(manifest.parts), dict(manifest.files), []
            all_tasks = [*tasks_of(bundle, name, options, asked, sms, temporary)]  # what cannot be cut is told first
            for part, tasks in groupby(all_tasks, lambda task: task.part):
                plans = []
                for task in tasks:
                    built, digest = _engine(task, name, options, kept, quiet=quiet)
                    file, job = Path(task.job.plan), task.job
                    # A new name: the old engine stays until the manifest is there.
                    final = f"{task.label}.{options.backend}-{digest[:8]}.plan"
                    files[final] = File(file.stat().st_size, digest)
                    moves.append((file, folder / final))
                    own = kernels if job.kernels else None
                    plan = Plan(
                        final, job.inputs, job.outputs, job.profiles, own is not None, built.tensorrt, built.cuda,
                        sms, own,
                    )  # fmt: skip
                    plans.append((task.layers, plan))
                parts[part] = replace(
                    parts[part], plans={**parts[part].plans, options.backend: _whole(bundle, part, plans)}
                )
            _put_in_place(folder, manifest, parts, files, moves, options, make_default)
            kept.done()
    except OSError as error:
        raise BackendError(f"writing into {name} failed: {error.strerror or error}", fix="free disk space") from error
    finally:
        kept.tell()
    return Bundle(folder, verify=False)


def _engine(task: Task, name: Path, options: EngineOptions, kept: Kept, *, quiet: bool) -> tuple[Built, str]:
    """Build an engine, or take it from those kept: how it was built, and its SHA-256."""
    plan = Path(task.job.plan)
    if found := kept.find(task.key, plan):
        logger.info(f"{task.label}: kept from the build before, plan {plan.stat().st_size / 1e6:.1f} MB")
        return found
    free = available_bytes()
    if task.needed > free:
        needed = f"{task.label}: needs about {task.needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        logger.warning(f"{needed}: it may fail" + (f"; {FEWER_LAYERS}" if task.part == "decoder" else ""))
    log = name.resolve().with_name(f"{name.resolve().name}.{task.label}.{options.backend}.log")
    built = _run(task.job, task.label, log, task.needed, keep_log=options.keep_log, quiet=quiet)
    digest = sha256(plan)
    kept.keep(task.key, plan, digest, built)
    cost = f"{built.seconds:.0f} s, {built.peak_bytes / 1e9:.2f} GB memory"
    logger.info(f"{task.label}: {cost}, plan {plan.stat().st_size / 1e6:.1f} MB")
    return built, digest


def _whole(bundle: Bundle, part: str, plans: list[tuple[tuple[int, int] | None, Plan]]) -> Plan:
    """The plan of a part, of one engine or several."""
    inputs, outputs = plan_io(part, bundle.manifest.geometry, bundle.precision)
    chain = tuple(Link(plan.file, layers, plan.inputs, plan.outputs) for layers, plan in plans if layers)
    return replace(plans[0][1], inputs=inputs, outputs=outputs, chain=chain)


def _configuration(bundle: Bundle, options: EngineOptions) -> Configuration:
    """What the engines of a bundle will be asked for at most."""
    manifest, apart = bundle.manifest, apart_of(bundle.manifest)
    floats = manifest.options.get("floats")  # bundles of before there were any do not name them
    return Configuration(
        manifest.geometry,
        bundle.precision,
        block=block_of(manifest),
        head=apart["head"],
        vision=apart["vision"],
        embeddings=apart["embeddings"],
        batch=options.batch,
        page_budget=manifest.page_budget,
        backend=options.backend,
        plugins=options.plugins,
        floats=tuple(map(str, floats)) if isinstance(floats, list) else (),
        layers_per_engine=options.layers_per_engine,
        residency=manifest.residency,
    )


def _again(manifest: Manifest, name: Path, options: EngineOptions, other: Configuration) -> str:
    """The command that builds the bundle again as another configuration: what is asked of engines here, engines alone
    cannot give."""
    p = other.precision
    return rebuild(
        manifest,
        name,
        backend=options.backend,
        engines={**asdict(options), "batch": other.batch, "layers_per_engine": other.layers_per_engine},
        precision=p.name,
        block_size=p.block_size(other.block, options.backend) if p.quantises else other.block,
        context=other.geometry.context,
        page_slots=other.geometry.page_slots,
        kv="int8" if other.geometry.int8_pages else "model",
        kv_cache="int8" if other.geometry.int8_cache else "model",
        residency=other.residency,
        **{kind: getattr(other, kind) for kind in APART},
    )


def _put_in_place(
    folder: Path,
    manifest: Manifest,
    parts: dict[str, Part],
    files: dict[str, File],
    moves: list[tuple[Path, Path]],
    options: EngineOptions,
    make_default: bool,
) -> None:
    """Move the engines into the bundle and list them; if that fails, the bundle is as it was."""
    used = {file for part in parts.values() for plan in part.plans.values() for file in plan.used}
    old = {file for part in manifest.parts.values() for plan in part.plans.values() for file in plan.used} - used
    files = {name: file for name, file in files.items() if name not in old}
    recorded = {**manifest.options, options.backend: json.loads(json.dumps(asdict(options)))}
    backend = options.backend if make_default else manifest.backend
    try:
        for source, target in moves:
            source.replace(target)
        write_manifest(folder, replace(manifest, parts=parts, files=files, options=recorded, backend=backend))
    except BaseException:
        for _, target in moves:
            if target.name not in manifest.files:
                target.unlink(missing_ok=True)
        raise
    for name in old:
        (folder / name).unlink(missing_ok=True)


def _require_kernels(bundle: Bundle, name: Path, options: EngineOptions, sms: Sequence[int]) -> str | None:
    """SHA-256 of the bundle's kernels, checked to be this model's and for these SMs; None without plugins."""
    manifest = bundle.manifest
    if not options.plugins:
        return None
    again = rebuild(manifest, name, backend=options.backend, engines=asdict(options))
    if manifest.kernels is None:
        raise BundleError(f"{name} holds no compiled kernels", expected="kernels of the plugins", fix=again)
    needed = kernels_of_model(attributes(manifest.geometry), bundle.precision.dtype)
    try:
        artifacts = Artifacts.read(bundle.file(manifest.kernels))
        artifacts.subset(needed, sms)
    except KernelError as error:  # which bundle, and how to build just this one
        unknown = [sm for sm in sms if sm not in SMS]
        if unknown:
            only = needing_plugins(manifest.geometry)
            again = (
                f"this project has no kernels for sm_{unknown[0]}: "
                + command(name, replace(options, plugins=False))
                + "".join(f"; the bundle must be built without {option} for that" for option in only)
            )
        raise error.within(str(name), fix=again) from error
    return manifest.files[manifest.kernels].sha256


def _run(job: Job, part: str, log: Path, needed: int, *, keep_log: bool, quiet: bool) -> Built:
    """Run a job in its own process. BackendError, which names the kept log, when it fails however it fails. `needed`:
    bytes of memory that it is said to take."""
    built, failure = None, None
    # Written under a name that nobody can guess, and then put in place: what has the log's own name is not written to.
    descriptor, draft = tempfile.mkstemp(dir=Path(job.plan).parent, prefix=f"{part}-", suffix=".log")
    with os.fdopen(descriptor, "wb") as file, progress(f"{part}: building", quiet=quiet) as show:
        process = subprocess.Popen(
            child.python("engines.trt.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=child.environment(),
            text=True,
        )
        assert process.stdin and process.stdout  # both are pipes
        try:
            with process.stdin as requests:
                requests.write(json.dumps(asdict(job)))
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    show(message["progress"])
                elif "error" in message:
                    failure = message["error"]
                else:
                    built = TypeAdapter(Built).validate_python(message["built"])
            code = process.wait()
        except BrokenPipeError:
            code = process.wait()
        finally:
            if process.poll() is None:  # this process was interrupted
                process.kill()
                process.wait()
    if code == 0 and built and not keep_log:
        Path(draft).unlink()
        with suppress(OSError):
            log.unlink()  # of an earlier build, about engines that are no more
        return built
    said = Path(draft).read_text(encoding="utf-8", errors="replace")
    try:
        Path(draft).replace(log)  # a link of that name is replaced, not followed
        where = f"log: {log}"
    except OSError as error:
        where = f"no log: {log} cannot be written: {error.strerror}"
    if code == 0 and built:
        return built
    told = _told(failure) if failure else _explained(code, part, needed, said)
    raise type(told)(f"{told.found}\n  {where}", expected=told.expected, fix=told.fix)


def _told(failure: dict[str, Any]) -> FlexError:
    """The error that the process has sent, of the class it had there."""
    kind: type[FlexError] = getattr(errors, failure["type"])
    return kind(failure["found"], expected=failure["expected"], fix=failure["fix"])


def _explained(code: int, part: str, needed: int, said: str) -> FlexError:
    """What the end of a process that could not speak for itself means. `needed`: see _run. `said`: its log."""
    if code in (-KILLED, 128 + KILLED):
        wanted, there = (f"{count / 1e9:.1f} GB" for count in (needed, available_bytes()))
        return BackendError(
            f"{part}: the builder was killed (signal 9), as the system does when memory runs out",
            expected=f"{BUILDER_FACTOR}x the weights and more: {wanted} free; there are {there}",
            fix="close programs, add swap, build on a machine with more memory, or build the bundle again with a "
            "smaller --context (python export/build.py)" + (f"; {FEWER_LAYERS}" if part.startswith("decoder") else ""),
        )
    if code < 0:
        name = signal.Signals(-code).name
        return BackendError(
            f"{part}: the builder died of {name}", expected="an engine", fix="see the log; try --optimization-level 2"
        )
    last = (said.strip().splitlines() or ["it printed nothing"])[-1]
    return BackendError(f"{part}: the builder ended with status {code}: {last}", fix="see the log")
