"""`--fit`: the options of a build that a board, or this machine, can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

from engines.bundle.tensors import APART
from engines.errors import OptionError
from engines.sizing.fitting import Fitting, fit
from engines.sizing.needs import Configuration
from engines.trt.options import EngineOptions
from export.fit_report import lacking, room_for
from export.options import BuildOptions
from export.recipe import Recipe


def _apart(kind: str, c: Configuration) -> dict[str, object]:
    return {kind: getattr(c, kind)}


# What a choice is among the options of a build, by its knob (engines/sizing/choices.py).
OPTIONS: dict[str, Callable[[Configuration], dict[str, object]]] = {
    "layers_per_engine": lambda c: {"layers_per_engine": c.layers_per_engine},
    "residency": lambda c: {"residency": c.residency},
    "kv": lambda c: {"kv": "int8" if c.geometry.int8_pages else "model"},
    "kv_cache": lambda c: {"kv_cache": "int8" if c.geometry.int8_cache else "model"},
    "page_slots": lambda c: {"projection": "lazy", "page_slots": c.geometry.page_slots},
    "context": lambda c: {"context": c.geometry.context},
    "precision": lambda c: {"precision": c.precision.name},
    **{kind: partial(_apart, kind) for kind in APART},
}
OF_ENGINES = ("layers_per_engine",)  # of these, fields of EngineOptions


def fitting(options: BuildOptions, recipe: Recipe, asked: Configuration) -> Fitting:
    """What fits in place of `asked`, where only what `options` leave at their default may change; `recipe`: of these
    options. OptionError, or BackendError when the memory to fit into cannot be told."""
    return fit(asked, room_for(recipe.backend, recipe.engines, "--fit"), kept(options))


def fitted(options: BuildOptions, found: Fitting) -> BuildOptions:
    """The options with the choices made. OptionError when nothing fits."""
    if not found.assessment.fits:
        fix = f"--target {found.larger} --fit, or a smaller model" if found.larger else "build a smaller model"
        raise OptionError(f"{found.assessment.room.name} {lacking(found)}", fix=fix)
    values: dict[str, object] = {"fit": False}
    engines: dict[str, object] = {}
    if found.assessment.configuration.block != found.asked.block:
        values["block_size"] = found.assessment.configuration.block
    for gain in found.gains:
        made = OPTIONS[gain.choice.knob](found.assessment.configuration)
        (engines if gain.choice.knob in OF_ENGINES else values).update(made)
    if engines:
        values["engines"] = replace(options.engines or EngineOptions(options.backend), **engines)
    return replace(options, **values)


def kept(options: BuildOptions) -> frozenset[str]:
    """The knobs that are not at their default: what is asked for is not chosen otherwise."""
    names = {each.name for each in fields(options) if getattr(options, each.name) != each.default}
    names |= {"head"} if options.quantize_head else set()
    return frozenset(names | {each for each in OF_ENGINES if getattr(options.engines, each, None) is not None})
