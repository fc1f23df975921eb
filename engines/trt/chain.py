"""Several engines of consecutive layers that run as one: each takes what those before it hand on.

What is handed on lies at the begin of the scratch memory, behind which all of them work: runs follow each other in one
stream, and nobody reads it after the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from engines.bundle.folder import Bundle
from engines.bundle.manifest import Plan
from engines.bundle.specs import TensorSpec
from engines.cuda import Buffer, Cuda, Stream
from engines.trt.engine import Context, PartEngine, nbytes
from plugins.op import padded


class Chain:
    """The engines of a plan, one or several; what a PartEngine has, of all together. specs: of the part, by name."""

    def __init__(self, trt: ModuleType, cuda: Cuda, bundle: Bundle, part: str, backend: str, plan: Plan) -> None:
        """Deserialise them. BackendError as of PartEngine."""
        self.plan = plan
        self.specs = {spec.name: spec for spec in (*plan.inputs, *plan.outputs)}
        links = plan.engines
        self.links = [PartEngine(trt, cuda, bundle, part, backend, each) for each in links]
        largest = {symbol: self.limits(symbol)[1] for symbol in ("batch", "steps")}
        self._handed = _handed_on(links, self.specs)
        self._places, self._handed_bytes = _places(links, self._handed, largest)

    @property
    def scratch(self) -> int:
        """Bytes of device memory a run needs beside its inputs and outputs."""
        return self._handed_bytes + max(link.scratch for link in self.links)

    def profile(self, **sizes: int) -> int:
        """See PartEngine.profile; all have the same."""
        return self.links[0].profile(**sizes)

    def limits(self, symbol: str) -> tuple[int, int]:
        """See PartEngine.limits."""
        return self.links[0].limits(symbol)

    def context(self, profile: int, scratch: Buffer, stream: Stream, *, one_shape: bool = False) -> ChainContext:
        """See PartEngine.context."""
        made = [
            link.context(profile, scratch, stream, offset=self._handed_bytes, one_shape=one_shape)
            for link in self.links
        ]
        places = {name: scratch.address + place for name, place in self._places.items()}
        return ChainContext(self.links, made, {name: (self._handed[name], place) for name, place in places.items()})


class ChainContext:
    """What a Context is, for all engines of a chain."""

    def __init__(
        self, links: Sequence[PartEngine], contexts: Sequence[Context], handed: dict[str, tuple[TensorSpec, int]]
    ) -> None:
        """`handed`: what is handed on, and where it lies."""
        self._users: dict[str, list[Context]] = {}  # of a tensor
        for link, context in zip(links, contexts, strict=True):
            for name in link.specs:
                self._users.setdefault(name, []).append(context)
        self._contexts, self._handed = contexts, handed

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """See Context.bind. With the new tokens, whose number what is handed on follows, that is bound, too."""
        for context in self._users[name]:
            context.bind(name, address, shape)
        if name == "input_ids":
            sizes: dict[int | str, int] = {"batch": shape[0], "steps": shape[1]}
            for handed, (spec, place) in self._handed.items():
                for context in self._users[handed]:
                    context.bind(handed, place, tuple(int(sizes.get(size, size)) for size in spec.shape))

    def enqueue(self, stream: Stream) -> None:
        """See Context.enqueue."""
        for context in self._contexts:
            context.enqueue(stream)

    def capturable(self, stream: Stream) -> bool:
        """See Context.capturable."""
        return all(context.capturable(stream) for context in self._contexts)


def _handed_on(links: Sequence[Plan], own: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for link in links for spec in link.outputs if spec.name not in own}


def _places(
    links: Sequence[Plan], handed: dict[str, TensorSpec], largest: dict[str, int]
) -> tuple[dict[str, int], int]:
    """Where what is handed on lies, from the begin of the scratch memory, and the bytes of it all. A place is given
    again once its last reader is done: hidden states take turns in two."""
    last = {spec.name: index for index, link in enumerate(links) for spec in link.inputs}
    places: dict[str, int] = {}
    free: list[tuple[int, int, int]] = []  # after which engine, place, size
    total = 0
    for index, link in enumerate(links):
        for spec in link.outputs:
            if spec.name not in handed:
                continue
            sizes = (largest[size] if isinstance(size, str) else size for size in spec.shape)
            size = padded(nbytes(sizes, spec.dtype))
            again = next((each for each in free if each[0] < index and each[2] == size), None)
            if again is None:
                place, total = total, total + size
            else:
                free.remove(again)
                place = again[1]
            places[spec.name] = place
            free.append((last[spec.name], place, size))
    return places, total
