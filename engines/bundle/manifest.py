"""`bundle.json`: everything a runtime must know about a bundle before it opens a single graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engines.bundle.geometry import Geometry
from engines.bundle.specs import TensorSpec
from engines.residency import ALL

MANIFEST = "bundle.json"
DIGEST = "digest"  # its key that holds the digest of all others; no field: it is of the file
FORMAT = 3  # raised when an older reader would misread the bundle; keys it does not know, it passes over

# Official: conv_templates["vicuna_v1"]. Also of bundles that hold its template and say nothing of turns.
SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
PROMPT_TEMPLATE = SYSTEM_PROMPT + " USER: <image>\n{prompt} ASSISTANT:"
TURN_TEMPLATE = " {answer}</s>USER: {prompt} ASSISTANT:"


@dataclass(frozen=True)
class Graph:
    """An .onnx file and what it takes and gives."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: (min, opt, max) of each symbol in the shapes of a plan's inputs."""

    name: str
    sizes: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Link:
    """One engine of several that make up a part: the layers from the first of `layers` to before the second. What it
    takes beside the part's inputs, those before it give."""

    file: str
    layers: tuple[int, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Plan:
    """A TensorRT engine, or the several that make up a part: what it takes and gives, and where it runs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    plugins: bool  # needs this project's plugins, which the plan carries the kernels of
    tensorrt: str  # version of the builder; no other version opens the plan
    cuda: str  # version that the builder was made for
    sms: tuple[int, ...]  # compute capabilities it runs on; 86 is 8.6
    kernels: str | None  # SHA-256 of the bundle's kernels it was built with; None without plugins
    chain: tuple[Link, ...] = ()  # of several engines, each; `file` is the first one's

    @property
    def engines(self) -> tuple[Plan, ...]:
        """Each of its engines as a plan of its own."""
        links = (replace(self, file=e.file, inputs=e.inputs, outputs=e.outputs, chain=()) for e in self.chain)
        return tuple(links) or (self,)

    @property
    def used(self) -> tuple[str, ...]:
        """The files of all its engines."""
        return tuple(engine.file for engine in self.engines)


@dataclass(frozen=True)
class Part:
    """One part of the model: `graphs` by kind, all over the same weights, and TensorRT engines by backend."""

    weights: str
    graphs: dict[str, Graph]
    plans: dict[str, Plan]


def is_template(text: str) -> bool:
    """Whether a prompt template holds "<image>" and "{prompt}", each once."""
    return text.count("<image>") == 1 and text.count("{prompt}") == 1


def is_turn_template(text: str) -> bool:
    """Whether the text between two questions holds "{answer}" and then "{prompt}", each once, and no "<image>"."""
    found = [text.count(field) for field in ("{answer}", "{prompt}", "<image>")]
    return found == [1, 1, 0] and text.index("{answer}") < text.index("{prompt}")


def is_system_prompt(text: str, template: str) -> bool:
    """Whether a system message can take the place of `text` in a prompt template: it is there once, before "<image>"
    and "{prompt}"."""
    if not text or template.count(text) != 1:
        return False
    return template.index(text) + len(text) <= min(template.index("<image>"), template.index("{prompt}"))


@dataclass(frozen=True)
class Prompt:
    """How a question, or a conversation, becomes token ids. Without a turn or a system text of its own, a bundle with
    the official template has the official ones."""

    template: str  # of the first question; see is_template
    tokenizer: str | None  # file in the bundle; None: the bundle takes raw token ids only
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    turn: str | None = None  # from the end of a question's prompt to that of the next one's; None: no conversations
    system: str | None = None  # the part of `template` that a system message replaces; None: no system messages

    def __post_init__(self) -> None:
        if self.template == PROMPT_TEMPLATE:
            object.__setattr__(self, "turn", TURN_TEMPLATE if self.turn is None else self.turn)
            object.__setattr__(self, "system", SYSTEM_PROMPT if self.system is None else self.system)


@dataclass(frozen=True)
class File:
    """Size and SHA-256 (hex) of a file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `bundle.json`."""

    format: int
    name: str
    precision: str  # key of PRECISIONS
    page_budget: int  # pages each layer may read at most, unless a request asks for fewer
    geometry: Geometry
    prompt: Prompt
    parts: dict[str, Part]
    backend: str  # one of BACKENDS: what opens the bundle unless another is asked for
    kernels: str | None  # file of the compiled kernels of the plugins
    files: dict[str, File]
    versions: dict[str, str]  # of this project and of what wrote the graphs
    source: dict[str, object]  # identity of the checkpoint
    options: dict[str, object]  # the build's knobs, as used
    dropped: dict[str, str]  # tensors of the checkpoint that are not in the bundle, and why
    scales: str | None = (
        None  # file of the scales folded into the weights (export/weights/folding.py); None: not calibrated
    )
    block_size: int | None = None  # one of its precision's; None where nothing is quantised
    residency: str = ALL  # one of RESIDENCIES: that it opens with unless told otherwise


def canonical(manifest: Mapping[str, object]) -> str:
    """What bundle.json holds, its own digest left out, as JSON with sorted keys, without spaces, in ASCII: how the file
    is laid out does not matter; any name, number or text in it does. RecursionError for what is nested too deep."""
    content = {key: value for key, value in manifest.items() if key != DIGEST}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(text: str) -> str:
    """ "sha256:..." of a canonical text: one for the whole bundle, since the manifest holds those of its files."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
