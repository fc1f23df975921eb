"""What training is told of questions: the low-res tokens of things that are counted, the numbers that are compared."""

from __future__ import annotations

import numpy as np
import pytest

from export.default_model.learning.packing import BESIDE, Lessons, arranged, pack
from export.default_model.learning.pool import LOWRES
from export.default_model.questions import KINDS, ask, build_tokenizer
from export.default_model.scenes import CANVAS, Style, make_scene

SIDE = CANVAS / LOWRES  # pixels of a low-res token


@pytest.fixture(scope="module")
def scenes():
    made = [make_scene(np.random.default_rng([5, index]), style=Style(alike=0.5)) for index in range(30)]
    return [(scene.things, scene.image.size) for scene in made]


def test_a_counted_thing_has_its_token_and_those_its_middle_is_nearly_on(scenes):
    """Against the distance of each token's square from the middle of the thing."""
    rng, tokenizer, counts, several = np.random.default_rng(1), build_tokenizer(), set(), 0
    row, column = np.divmod(np.arange(LOWRES * LOWRES), LOWRES)
    for things, size in scenes:
        for _ in range(6):
            question = ask(rng, things, size, "count")
            packed = arranged(question, things, tokenizer)
            near = [set(tokens[tokens >= 0].tolist()) for tokens in packed["near"]]
            assert len([tokens for tokens in near if tokens]) == packed["count"] == len(question.about)
            for index, tokens in zip(question.about, near, strict=False):
                x, y = things[index].centre
                far = [np.abs(at * SIDE + SIDE / 2 - where) - SIDE / 2 for at, where in ((column, x), (row, y))]
                assert tokens == set(np.flatnonzero(np.maximum(*far) <= BESIDE).tolist())
                several += len(tokens) > 1
            counts.add(int(packed["count"]))
    assert {0, 1, 2, 5, 8} <= counts and several > 50


def test_other_questions_count_nothing(scenes):
    batch = pack(np.random.default_rng(0), scenes[:8], 9, build_tokenizer())
    others = batch.kind != KINDS.index("count")
    assert (batch.near[others] == -1).all() and (batch.count[others] == -1)[batch.kind[others] < len(KINDS) - 1].all()


def test_close_numbers_are_compared_where_there_are_some(scenes):
    rng, found = np.random.default_rng(2), 0
    for things, size in scenes:
        two = [thing.number for thing in things if len(thing.number) == 2]
        pairs = [(a, b) for a in two for b in two if a[0] == b[0] and a != b]
        for _ in range(3):
            numbers = ask(rng, things, size, "compare", close=True).answer.split(",")[0].split(" and ")
            found += bool(pairs)
            assert not pairs or tuple(numbers) in pairs
    assert found > 20


def test_lessons_compare_close_numbers_more_often_than_scenes_have_them(scenes):
    tokenizer, kind = build_tokenizer(), KINDS.index("compare")

    def close_share(batches) -> float:
        answers = [row[row >= 0].tolist() for batch in batches for row in batch.answer[batch.kind == kind]]
        pairs = [tokenizer.decode(answer).split(",")[0].split(" and ") for answer in answers]
        return float(np.mean([len(a) == len(b) == 2 and a[0] == b[0] for a, b in pairs]))

    lessons = Lessons(scenes, 12, (8, 9), seed=0)
    rng = np.random.default_rng(3)
    usual = close_share(pack(rng, scenes, 9, tokenizer) for _ in range(4))
    assert close_share(lessons[step][1] for step in range(12)) > 1.5 * usual > 0
