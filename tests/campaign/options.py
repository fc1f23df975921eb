"""Options, ids and images of all kinds to one engine, which must be usable after each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engines.errors import FlexError
from runtime import Engine
from tests.campaign.bundles import PROMPT
from tests.campaign.mutate import ODD
from tests.campaign.trial import Wrong

NUMPY = st.sampled_from([np.uint8(97), np.int64(3), np.float32(0.5), np.bool_(True), np.array(2), np.nan, np.int8(-1)])
VALUES = st.one_of(
    ODD, NUMPY, st.integers(-2, 100), st.just(["a"]), st.just(("",)), st.sampled_from([b"x", {1}, range(3)])
)
NAMES = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "stop_at_eos", "page_budget", "trace")
IMAGES = st.sampled_from(
    [
        *(
            None,
            np.zeros((9, 9, 3), np.uint8),
            np.zeros((0, 9, 3), np.uint8),
            np.zeros((9, 9), np.uint8),
            "",
            "\0",
            "/",
            b"",
        ),
        *(
            np.zeros((9, 9, 3), np.float32),
            np.zeros((4, 4, 3), np.uint8)[::-1, ::-2],
            3,
            [],
            memoryview(b"x"),
            Path("gone"),
        ),
        np.zeros((9, 9, 3), object),
    ]
)
REQUESTS = st.lists(
    st.tuples(
        IMAGES,
        st.one_of(st.just(PROMPT), VALUES),
        st.one_of(st.none(), VALUES, st.lists(st.one_of(st.integers(-300, 400), ODD), max_size=6)),
        st.dictionaries(st.sampled_from([*NAMES, *NAMES, "unknown", "exif", "special_tokens"]), VALUES, max_size=3),
    ),
    min_size=1,
    max_size=12,
)


def run(folder: Path, expected: list[int], requests: list[tuple[Any, Any, Any, dict]], scratch: Path) -> str:
    """Ask an engine all of them; Wrong when an option is not kept, or the engine answers otherwise afterwards."""
    engine, answered = Engine(folder, threads=1), 0
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    for image, prompt, ids, options in requests:
        given = dict(options)
        limit = given.setdefault("max_new_tokens", 3)
        try:
            answer = engine.generate(image, prompt, input_ids=ids, **given)
        except FlexError as error:
            str(error).encode("utf-8", "surrogatepass")
            continue
        answered += 1
        if not 1 <= len(answer.token_ids) <= int(limit):
            raise Wrong(f"{len(answer.token_ids)} tokens with {given}")
        if not all(type(token) is int for token in answer.token_ids):
            raise Wrong(f"tokens that are no integers with {given}")
        stops = given.get("stop") or ()
        if any(stop in answer.text for stop in ([stops] if isinstance(stops, str) else stops)):
            raise Wrong(f"{answer.text!r} with {given}")
        if answer.stats.pages_read.max(initial=0) > int(
            given.get("page_budget") or 10**9 if given.get("page_budget") != 0 else 0
        ):
            raise Wrong(f"more pages than {given}")
    found = engine.generate(picture, PROMPT, max_new_tokens=4, stop_at_eos=False).token_ids
    if found != expected:
        raise Wrong(f"afterwards it answers {found} in place of {expected}")
    return f"{answered} of {len(requests)} answered"
