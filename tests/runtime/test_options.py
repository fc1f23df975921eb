"""Options of a request: numbers of any kind, stop strings, and how much a prompt may hold."""

from __future__ import annotations

import itertools
import time
from array import array
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from runtime import Engine, OptionError, Options, PromptError
from runtime.request import STOP_LENGTH, STOP_STRINGS
from runtime.sampling import Sampler, Sampling
from tests.runtime.questions import GEOMETRY, PHOTO, QUESTION


@pytest.fixture(scope="module")
def engine(random_model) -> Engine:
    return Engine(random_model("engine", GEOMETRY, tokenizer=True)[1])


INTEGERS = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize("kind", INTEGERS)
def test_numpys_integers_are_integers(kind, engine):
    """np.uint8(97) and a prompt of 60 tokens are 157, not 157 - 256."""
    options = Options(max_new_tokens=kind(97), top_k=kind(5), seed=kind(7), page_budget=kind(3), temperature=kind(1))
    for name in ("max_new_tokens", "top_k", "seed", "page_budget"):
        assert type(getattr(options, name)) is int
    assert type(options.temperature) is float
    given = {"page_budget": 3, "temperature": 1.0, "top_k": 5, "seed": 7, "stop_at_eos": False}
    asked = {name: value if isinstance(value, bool) else kind(value) for name, value in given.items()}
    expected = engine.generate(PHOTO, QUESTION, max_new_tokens=97, **given).token_ids
    assert engine.generate(PHOTO, QUESTION, max_new_tokens=kind(97), **asked).token_ids == expected
    assert len(expected) == 97


def test_numpys_top_k_does_not_wrap_around():
    """-np.uint8(2) is 254."""
    logits = np.arange(300, dtype=np.float32)
    sampler = Sampler(Sampling(temperature=100.0, top_k=np.uint8(2), seed=0))
    assert {sampler.pick(logits) for _ in range(50)} == {298, 299}


NO_NUMBERS = {
    "true": True, "numpy's true": np.True_, "negative": -1, "text": "5", "bytes": b"5", "list": [5], "tuple": (),
    "dict": {}, "object": object(), "complex": 5j, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"),
    "numpy's nan": np.float64("nan"), "numpy's inf": np.float32("inf"), "array": np.array([5]), "scalar": np.array(5),
    "decimal": Decimal("0.5"), "fraction": Fraction(1, 2), "10^30": 10**30, "-10^30": -(10**30), "10^5000": 10**5000,
    "-10^5000": -(10**5000),
}  # fmt: skip


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "page_budget", "temperature", "top_p"])
@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_numbers_that_are_none(name, kind, engine):
    """Typed, before any work. As a seed, a number of tokens to sample from or a temperature, huge ones are numbers."""
    value = NO_NUMBERS[kind]
    options = {"temperature": 1.0, name: value}
    if (name in ("seed", "top_k") and kind in ("10^30", "10^5000")) or (name == "temperature" and kind == "10^30"):
        Options.parse(options)
        return
    with pytest.raises(OptionError, match=name) as caught:
        engine.generate(None, "hello", **options)
    assert caught.value.expected and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "page_budget"])
@pytest.mark.parametrize("value", [1.5, 2.0, np.float32(2.0)])
def test_a_float_is_no_integer(name, value, engine):
    with pytest.raises(OptionError, match=name):
        engine.generate(None, "hello", **{"temperature": 1.0, name: value})


@pytest.mark.parametrize("name", ["stop_at_eos", "trace", "special_tokens"])
@pytest.mark.parametrize("value", [1, 0, None, "yes", np.True_])
def test_yes_or_no(name, value, engine):
    with pytest.raises(OptionError, match=name):
        engine.generate(None, "hello", **{name: value})


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


BAD_STOPS = {
    "none": (None, "stop=None"),
    "a number": (5, "stop=5"),
    "bytes": (b"x", "stop=b'x'"),
    "a view": (memoryview(b"x"), "stop="),
    "an array without dimensions": (np.array(5), "stop="),
    "empty": ("", "non-empty"),
    "one of them empty": (["a", ""], "non-empty"),
    "bytes in a list": ([b"x"], "non-empty"),
    "none in a list": ([None], "non-empty"),
    "an array of arrays": (np.array([["a"]]), "non-empty"),
    "unprintable": (Unprintable(), "cannot be printed"),
    "unprintable in a list": ([Unprintable()], "cannot be printed"),
    "long": ("x" * (STOP_LENGTH + 1), f"{STOP_LENGTH + 1} characters"),
    "many": (["x"] * (STOP_STRINGS + 1), f"at most {STOP_STRINGS}"),
    "without end": (itertools.repeat("x"), f"at most {STOP_STRINGS}"),
}


@pytest.mark.parametrize("kind", BAD_STOPS)
def test_what_is_no_stop_string(kind, engine):
    stop, text = BAD_STOPS[kind]
    with pytest.raises(OptionError, match=text) as caught:
        engine.generate(None, "hello", stop=stop)
    assert caught.value.expected and len(str(caught.value)) < 300


def test_stop_strings_may_be_given_in_any_way():
    expected = ("a", "bc")
    for stop in (["a", "bc"], ("a", "bc"), iter(["a", "bc"]), {"a": 1, "bc": 2}, np.array(["a", "bc"])):
        assert Options.parse({"stop": stop}).stop == expected
    assert Options.parse({"stop": "x" * STOP_LENGTH}).stop == ("x" * STOP_LENGTH,)
    assert len(Options.parse({"stop": ["x"] * STOP_STRINGS}).stop) == STOP_STRINGS


def test_a_prompt_that_cannot_fit_is_not_tokenised(engine, monkeypatch):
    most = GEOMETRY.context * engine.prompter.longest
    for prompt in ("x" * (most + 1), " " * 50_000_000):
        begun = time.perf_counter()
        with pytest.raises(PromptError, match=f"a prompt of {len(prompt)} characters") as caught:
            engine.generate(None, prompt)
        assert f"at most {most}" in caught.value.expected and time.perf_counter() - begun < 1
    with pytest.raises(PromptError, match="tokens"):  # this one is counted in tokens
        engine.generate(None, "x" * most)


@pytest.mark.parametrize("count", [GEOMETRY.context + 1, 10**12, 10**30])
def test_ids_that_cannot_fit_are_not_made_an_array(count, engine):
    with pytest.raises(PromptError, match=r"input_ids\n.*at most 200"):
        engine.generate(None, input_ids=range(count))


def test_arrays_of_ids_that_are_too_long(engine):
    for ids in (np.broadcast_to(np.int64(1), 10**12), np.ones(GEOMETRY.context + 1, np.int64)):
        with pytest.raises(PromptError, match="at most 200"):
            engine.generate(None, input_ids=ids)
    with pytest.raises(PromptError):
        engine.generate(None, input_ids=np.broadcast_to(np.int64(1), (1, 10**12)))


def test_ids_of_numpys_kinds(engine):
    expected = engine.generate(None, input_ids=[1, 5, 7], max_new_tokens=3, stop_at_eos=False).token_ids
    for ids in ([np.uint8(1), np.int64(5), 7], np.array([1, 5, 7], np.uint8), (1, 5, 7), array("l", [1, 5, 7])):
        assert engine.generate(None, input_ids=ids, max_new_tokens=3, stop_at_eos=False).token_ids == expected
