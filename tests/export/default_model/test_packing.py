"""What training is told of questions: the low-res tokens of things that are counted, the digits that are compared; and
how often it is asked what is hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.default_model.asking.plain import MANY
from export.default_model.learning.packing import Lessons, arranged, pack
from export.default_model.learning.pool import BESIDE, LOWRES, SIDE
from export.default_model.questions import KINDS, ask, build_tokenizer
from export.default_model.scenes import Style, make_scene


@pytest.fixture(scope="module")
def scenes():
    made = [make_scene(np.random.default_rng([5, index]), style=Style(alike=0.5)) for index in range(30)]
    return [(scene.things, scene.image.size) for scene in made]


def test_a_counted_thing_has_the_tokens_that_share_its_middle(scenes):
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
                assert tokens == set(np.flatnonzero(np.maximum(*far) < BESIDE).tolist())
                several += len(tokens) > 1
            counts.add(int(packed["count"]))
    assert {0, 1, 2, 5, 8} <= counts and several > 50


def test_other_questions_count_nothing(scenes):
    batch = pack(np.random.default_rng(0), scenes[:8], 9, build_tokenizer())
    others = batch.kind != KINDS.index("count")
    assert (batch.near[others] == -1).all() and (batch.count[others] == -1)[batch.kind[others] < len(KINDS) - 1].all()


def test_close_numbers_and_cut_ones_are_compared_where_there_are_some(scenes):
    rng, close, cut = np.random.default_rng(2), 0, 0
    for things, size in scenes:
        values = {(a.number, b.number) for a in things for b in things if a.number != b.number}
        two = {(a, b) for a, b in values if len(a) == len(b) == 2 and a[0] == b[0]}
        border = {pair for pair in values for thing in things if thing.cut and thing.number in pair}
        for _ in range(3):
            pair = tuple(ask(rng, things, size, "compare", hard=True).answer.split(",")[0].split(" and "))
            assert pair in two | border or not two | border
            close += pair in two and bool(border)
            cut += pair in border and bool(two)
    assert close > 10 and cut > 10


def test_many_things_are_counted_where_there_are_many(scenes):
    rng, found = np.random.default_rng(4), []
    for things, size in scenes:
        looks = [thing.colour for thing in things] + [thing.shape for thing in things] + ["all"] * len(things)
        most = max(map(looks.count, looks))
        for _ in range(3):
            counted = len(ask(rng, things, size, "count", hard=True).about)
            assert counted >= MANY or most < MANY
            found += [counted] * (most >= MANY)
    assert set(found) >= {3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("kind", ["one", "two"])
def test_a_number_that_tiles_cut_is_read_where_there_is_one(scenes, kind):
    rng, found, second = np.random.default_rng(7), 0, set()
    for things, size in scenes:
        cut = {index for index, thing in enumerate(things) if thing.cut}
        for _ in range(3):
            read = list(dict.fromkeys(thing for _, thing, _ in ask(rng, things, size, kind, hard=True).reads))
            assert len(read) == {"one": 1, "two": 2}[kind] and (cut & {*read} or not cut)
            found += bool(cut)
            second.add(read[-1] in cut)
    assert found > 20 and len(second) == 2


def test_the_digits_of_a_comparison_stand_by_tens_and_units(scenes):
    """Against the answer's own words."""
    rng, tokenizer, single = np.random.default_rng(6), build_tokenizer(), 0
    for things, size in scenes:
        question = ask(rng, things, size, "compare")
        packed = arranged(question, things, tokenizer)
        at = packed["digits"]
        shown = ["" if token < 0 else tokenizer.id_to_token(packed["ids"][token])[-1] for token in at]
        numbers = question.answer.split(",")[0].split(" and ")
        assert ["".join(shown[:2]), "".join(shown[2:])] == numbers
        assert all(shown[1::2]) and (at < packed["where"][packed["compared"]]).all()
        single += "" in shown
        assert (arranged(ask(rng, things, size, "two"), things, tokenizer)["digits"] == -1).all()
    assert 0 < single < len(scenes)


def test_lessons_ask_what_is_hard_more_often_than_scenes_have_it(scenes):
    tokenizer = build_tokenizer()

    def shares(batches) -> tuple[float, float, float]:
        """Of comparisons those of close numbers, of counts those of MANY things, of single numbers those with a digit
        that can be read in two tiles."""
        batches = list(batches)
        compared = [row[row >= 0].tolist() for b in batches for row in b.answer[b.kind == KINDS.index("compare")]]
        pairs = [tokenizer.decode(answer).split(",")[0].split(" and ") for answer in compared]
        many = torch.cat([b.count[b.kind == KINDS.index("count")] >= MANY for b in batches])
        read = [parts for b in batches for parts in b.parts[b.kind == KINDS.index("one")]]  # each [reads, parts]
        tiles = [torch.where(parts >= 0, parts // 36 // 12 * 3 + parts % 36 // 12, -1) for parts in read]
        several = [bool(((tile != tile[:, :1]) & (tile >= 0)).any()) for tile in tiles]
        close = [len(a) == len(b) == 2 and a[0] == b[0] for a, b in pairs]
        return float(np.mean(close)), float(many.float().mean()), float(np.mean(several))

    lessons = Lessons(scenes, 12, (8, 9), seed=0)
    rng = np.random.default_rng(3)
    usual = shares(pack(rng, scenes, 9, tokenizer) for _ in range(4))
    hard = shares(lessons[step][1] for step in range(12))
    assert hard[0] > 1.5 * usual[0] > 0 and hard[1] > 1.3 * usual[1] > 0 and hard[2] > 1.3 * usual[2] > 0
