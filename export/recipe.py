"""What is to be built, settled: the options as given, and what the checkpoint's configuration makes of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engines.bundle.geometry import Geometry
from engines.bundle.kinds import ONNXRUNTIME
from engines.bundle.pages import equally_long
from engines.bundle.precision import DEFAULT, PRECISIONS, Precision
from engines.bundle.tensors import APART, Coding, coding_of
from engines.errors import OptionError
from engines.sizing.needs import Configuration
from engines.trt.options import EngineOptions
from export.check import STEPS
from export.checkpoint.config import ModelConfig
from export.checkpoint.folder import Checkpoint
from export.checkpoint.packed import PackedCheckpoint, floats_of
from export.checkpoint.packed_settings import Packing
from export.options import BuildOptions
from export.weights.scheme import require_blocks


@dataclass(frozen=True)
class Recipe:
    """A build in which nothing is open any more, but for one thing that only the files of a packed checkpoint tell:
    which of its weights are floats (`confirmed`).

    config: the checkpoint's, with the geometry of the bundle. folder: where the bundle goes. coding: which weights
    are stored in codes, and how. calibrate: data to choose scales and clips by. page_budget: pages a layer may read
    at most. engines: the TensorRT engines to build, None for ONNX Runtime. residency: one of RESIDENCIES, that the
    bundle opens with. check: one of CHECKS.
    """

    model: Path
    folder: Path
    config: ModelConfig
    precision: Precision
    coding: Coding
    calibrate: Path | None
    page_budget: int
    backend: str
    engines: EngineOptions | None
    residency: str
    check: str

    @property
    def geometry(self) -> Geometry:
        """Of the bundle."""
        return self.config.geometry

    def confirmed(self, checkpoint: Checkpoint) -> Recipe:
        """The same for the checkpoint as it was opened: what a packed one holds as floats, its weights say, where
        settle could only go by its settings."""
        if not isinstance(checkpoint, PackedCheckpoint):
            return self
        return replace(self, coding=replace(self.coding, floats=floats_of(checkpoint, self.config)))

    def configuration(self, batch: int | None = None, slots: int = Configuration.slots) -> Configuration:
        """What sizing asks about; `batch`: rows of a request, those of the engines when not given; `slots`: requests
        that share decode steps."""
        engines, coding = self.engines, self.coding
        rows = engines.batch if engines else 1
        return Configuration(
            self.geometry,
            self.precision,
            block=coding.block,
            head=coding.option("head"),
            vision=coding.option("vision"),
            embeddings=coding.option("embeddings"),
            batch=rows if batch is None else batch,
            slots=slots,
            page_budget=self.page_budget,
            backend=self.backend,
            plugins=engines.plugins if engines else True,
            floats=coding.floats,
            fixed=self.config.packing is not None,
            layers_per_engine=engines.layers_per_engine if engines else None,
            residency=self.residency,
        )

    def record(self, calibration: dict[str, object] | None) -> dict[str, object]:
        """The knobs as this build uses them, for the manifest; of folders only their names, which say nothing about
        this machine. `calibration`: what it was made with, if it was."""
        g, coding = self.geometry, self.coding
        used: dict[str, object] = {
            "model": self.model.resolve().name,
            "out": self.folder.resolve().name,
            "precision": self.precision.name,
            "block_size": coding.block,
            "quantize_head": coding.head is not None and coding.head == coding.linear,
            **{kind: coding.option(kind) for kind in APART},
            "calibrate": self.calibrate.resolve().name if self.calibrate else None,
            "page_budget": self.page_budget,
            "context": g.context,
            "projection": "lazy" if g.lazy_pages else "eager",
            "page_slots": g.page_slots,
            "kv": "int8" if g.int8_pages else "model",
            "kv_cache": "int8" if g.int8_cache else "model",
            "backend": self.backend,
            "residency": self.residency,
            "check": self.check,
            "floats": list(coding.floats),
            "not_obeyed": list(self.config.unknown),
            "calibration": calibration,
        }
        if self.engines:
            used[self.backend] = json.loads(json.dumps(asdict(self.engines)))  # tuples as the manifest reads them
        return used


def settle(options: BuildOptions, config: ModelConfig) -> Recipe:
    """The recipe for a checkpoint whose configuration is `config`.

    OptionError for what this model does not admit, and for what a packed checkpoint decides otherwise.
    """
    g = _adjusted(config.geometry, options)
    if config.packing is None:
        precision = PRECISIONS[options.precision] if options.precision else DEFAULT
        head = precision.name if options.quantize_head else options.head
        coding = _coding(precision, options.block_size, head, options)
        require_blocks(g, coding)
    else:
        precision, block, floats = config.packing.precision, config.packing.block(g), config.packing.floats(g)
        coding = _coding(precision, block, _carried(config.packing, g, options), options)
        # Its own groups were checked against its weights when it was packed, and are when it is opened.
        require_blocks(g, replace(coding, linear=None, head=None if coding.head == coding.linear else coding.head))
        coding = replace(coding, floats=floats)
    return Recipe(
        model=options.model,
        folder=options.out or Path("build") / f"{options.model.resolve().name}-{precision}",
        config=replace(config, geometry=g),
        precision=precision,
        coding=coding,
        calibrate=options.calibrate,
        page_budget=g.pages if options.page_budget is None else options.page_budget,
        backend=options.backend,
        engines=None if options.backend == ONNXRUNTIME else options.engines or EngineOptions(options.backend),
        residency=options.residency,
        check=options.check,
    )


def _adjusted(g: Geometry, options: BuildOptions) -> Geometry:
    """The checkpoint's geometry with what the options change."""
    if options.page_budget is not None and not 0 <= options.page_budget <= g.pages:
        raise OptionError(
            f"--page-budget {options.page_budget}",
            expected=f"0 .. {g.pages}, this model's pages",
            fix=f"--page-budget {min(max(options.page_budget, 0), g.pages)}",
        )
    context = g.context if options.context is None else options.context
    least = g.image_tokens + 2 * STEPS  # room for a question and an answer
    if least > g.context:
        raise OptionError(
            f"this model's context of {g.context} tokens",
            expected=f"at least {least}: {g.image_tokens} of an image, and a short question and answer",
            fix="use a model of a larger context",
        )
    if not least <= context <= g.context:
        raise OptionError(
            f"a context of {context} tokens",
            expected=f"{least} .. {g.context} for this model",
            fix=f"--context {min(max(context, least), g.context)}",
        )
    lazy = options.projection == "lazy"
    if lazy and g.attention_bias:
        raise OptionError("--projection lazy for a model with attention biases", fix="--projection eager")
    page_slots = options.page_slots
    if page_slots is not None and not 1 <= page_slots <= g.pages:
        raise OptionError(
            f"--page-slots {page_slots}",
            expected=f"1 .. {g.pages}, this model's pages",
            fix=f"--page-slots {min(max(page_slots, 1), g.pages)}",
        )
    if page_slots is not None and not equally_long(g):
        raise OptionError(
            f"--page-slots for a model of {g.hires_side} hi-res tokens a side in {g.cells} cells",
            expected="pages that are all equally long, so that each can take another's page slot",
            fix="leave out --page-slots: every page then has a place of its own",
        )
    int8_pages, int8_cache = options.kv == "int8", options.kv_cache == "int8"
    return replace(
        g, context=context, lazy_pages=lazy, int8_pages=int8_pages, int8_cache=int8_cache, page_slots=page_slots
    )


def _coding(precision: Precision, block: int | None, head: str, options: BuildOptions) -> Coding:
    vision, embeddings = options.vision, options.embeddings
    return coding_of(precision, block, options.backend, head=head, vision=vision, embeddings=embeddings)


def _carried(packing: Packing, g: Geometry, options: BuildOptions) -> str:
    """What becomes of the head of a packed checkpoint, as --head has it; OptionError where options want other integers
    than the checkpoint's own."""
    if options.calibrate is not None:
        raise OptionError(
            f"--calibrate for a checkpoint that is quantised already ({packing.text})", fix="leave it out"
        )
    own, block, head = packing.precision, packing.block(g), packing.head and not g.tied_embeddings
    asked = [f"--{options.precision}"] if options.precision not in (None, own.name) else []
    asked += [f"--block-size {options.block_size}"] if options.block_size not in (None, block) else []
    asked += ["--quantize-head"] if options.quantize_head and not head else []
    asked += [f"--head {options.head}"] if head and options.head not in (BuildOptions.head, own.name) else []
    if asked:
        flags = f"--{own} --block-size {block}" + (" --quantize-head" if head else "")
        why = ""
        if packing.grows:
            why = "; code - zero point is in -15 .. 15, and neither int4 nor TensorRT has zero points"
        raise OptionError(
            f"{' '.join(asked)} for a checkpoint that is quantised already ({packing.text})",
            expected=f"its own integers, carried over as they are: {own} in blocks of {block}{why}",
            fix=f"{flags}, or leave these options out",
        )
    return own.name if head else options.head
