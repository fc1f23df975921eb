"""Digits, scenes, their labels and the packed questions say the truth."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from export.default_model import digits, strokes
from export.default_model.digits import Hand, Pens
from export.default_model.learning.packing import EOS, PARTS, READS, pack
from export.default_model.learning.pool import FIRST, NOTHING, SECOND, SINGLE, labels, lowres, lowres_token, padded
from export.default_model.questions import KINDS, build_tokenizer
from export.default_model.scenes import (
    BORDER,
    CANVAS,
    COLOURS,
    PATCH,
    SHAPES,
    SIZES,
    SMALLEST,
    TILE,
    Scene,
    Style,
    make_scene,
    varied,
)

STYLES = {
    "usual": Style(),
    "wide": Style(aspect=2.0),
    "narrow, dark, cluttered": Style(aspect=0.5, background="dark", clutter=2.0),
    "coloured, plain ink": Style(background="coloured", plain=True),
    "photographed": Style(photo=True),
    "compressed": Style(quality=60),
    "drawn": Style(plain=True, drawn=True),
}
SEEDS = range(3)


@cache
def scene_of(style: str, seed: int) -> Scene:
    return make_scene(np.random.default_rng(seed), "test", STYLES[style])


def test_no_form_is_in_two_splits_and_every_digit_in_each():
    forms = {split: strokes.forms(split) for split in strokes.SPLITS}
    assert sum(map(len, forms.values())) == sum(map(len, strokes.FORMS.values()))
    everything = [form for each in forms.values() for form in each]
    assert len(set(everything)) == len(everything)
    for split, found in forms.items():
        assert {digit for digit, _ in found} == set(range(10)), split
        fields, written = strokes.distances(split)
        assert fields.shape == (len(found), 48, 48) and written.tolist() == [digit for digit, _ in found]
        assert np.isfinite(fields).all() and (fields.min((1, 2)) < 0.05).all()  # the path goes through the square


def test_strokes_run_through_their_points_and_turn_at_corners():
    (curve,) = strokes.curves("0,0 3,0 3,0 3,10")
    for point in ((0, 0), (3, 0), (3, 10)):
        assert np.abs(curve - point).sum(1).min() < 1e-9
    assert all(min(abs(x - 3), abs(y)) < 0.8 for x, y in curve)  # a corner: nothing is cut off, a little overshot
    (round_one,) = strokes.curves("0,0 3,0 3,10")
    assert max(min(abs(x - 3), abs(y)) for x, y in curve) < max(min(abs(x - 3), abs(y)) for x, y in round_one)


def test_the_lowres_view_sees_little_of_a_digit(monkeypatch):
    pens, count = Pens.of("train"), 60
    random = torch.Generator().manual_seed(0)
    centre = torch.rand(count, 2, generator=random) * 3 + 170  # at any place in a pixel of the low-res view
    height = digits.HEIGHT * (SIZES[0] + (SIZES[1] - SIZES[0]) * torch.rand(count, generator=random))
    angle = 0.5 * torch.rand(count, generator=random) - 0.25
    begin = digits.corner(centre, digits.WINDOW).int().tolist()

    def left(part: float, hide: float = 1.0) -> float:
        monkeypatch.setattr(digits, "HIDE", part)
        windows = digits.draw(
            pens.distance[:count], centre, height, angle, torch.full((count,), hide),
            torch.Generator().manual_seed(1), Hand(), torch.ones(count),
        )  # fmt: skip
        canvas = torch.zeros(count, CANVAS, CANVAS, 1)
        for index, (row, column) in enumerate(begin):
            canvas[index, row : row + digits.WINDOW, column : column + digits.WINDOW, 0] = windows[index]
        return float(torch.cat([lowres(part) for part in canvas.split(20)]).abs().mean())

    hidden = digits.HIDE
    ink, halo = left(0.0, 0.0), left(0.0)
    assert left(1.0) < 0.01 * ink  # all that the reduction sees is taken out
    assert left(hidden) < 0.2 * halo < 0.2 * ink


def test_bold_strokes_have_more_ink():
    def ink(bold: float) -> float:
        some, centre = torch.full((20,), 1.0), torch.full((20, 2), 250.0)
        windows = digits.draw(
            Pens.of("train").distance[:20], centre, 16 * some, 0 * some, 0 * some, torch.Generator().manual_seed(2),
            Hand(), bold * some,
        )  # fmt: skip
        return float(-windows.sum())

    thin, usual, thick = (ink(math.exp(power)) for power in (digits.BOLD[0], 0.0, digits.BOLD[1]))
    assert thin < 0.9 * usual and thick > 1.6 * usual


@pytest.mark.parametrize("style", STYLES)
def test_scenes_are_as_described(style):
    for seed in SEEDS:
        scene = scene_of(style, seed)
        width, height = scene.image.size
        assert scene.image.mode == "RGB" and max(width, height) == CANVAS
        aspect = STYLES[style].aspect
        assert abs(math.log(width / height / aspect)) < 0.01 if aspect else 0.59 < width / height < 1.61
        assert len({thing.name for thing in scene.things}) == len(scene.things) >= 2
        low = (CANVAS - width) // 2, (CANVAS - height) // 2
        for thing in scene.things:
            assert thing.colour in COLOURS and thing.shape in SHAPES
            assert thing.number.isdigit() and str(int(thing.number)) == thing.number
            assert len(thing.digits) == len(thing.number) <= 2
            smallest = SMALLEST if STYLES[style].drawn else SIZES[0]
            assert smallest <= thing.height / digits.HEIGHT <= SIZES[1]
            for place in (thing.centre, *thing.digits):
                assert all(a <= at <= a + side for at, a, side in zip(place, low, (width, height), strict=True))
            assert all(math.dist(place, thing.centre) < thing.radius for place in thing.digits)


@pytest.mark.parametrize("style", ["usual", "narrow, dark, cluttered", "photographed", "compressed"])
def test_things_have_their_colour_where_they_are_said_to_be(style):
    """Below and above the plate; also where a camera moved them."""
    wrong, count = [], 0
    for seed in SEEDS:
        scene = scene_of(style, seed)
        pixels = padded(scene.image).astype(float)
        for thing in scene.things:
            x, y = thing.centre
            around = [(x + dx, y + dy) for dx in (-4, 0, 4) for dy in (-20, -17, -15, 15, 17, 20)]
            found = np.median([pixels[int(b), int(a)] for a, b in around], 0)
            nearest = min(COLOURS, key=lambda name, found=found: float(np.abs(found - COLOURS[name]).sum()))
            count += 1
            if nearest != thing.colour:
                wrong.append((seed, thing.name, nearest, found.tolist()))
    assert len(wrong) <= 0.1 * count, wrong  # shades vary, and cameras change them


@pytest.mark.parametrize("style", ["usual", "coloured, plain ink", "photographed", "drawn"])
def test_digits_are_where_they_are_said_to_be(style):
    """The patches of `parts` differ from pixel to pixel; the middles of things beside their plates do not."""
    for seed in SEEDS:
        scene = scene_of(style, seed)
        grey = padded(scene.image).astype(float).mean(-1)
        spread = grey.reshape(36, PATCH, 36, PATCH).swapaxes(1, 2).std((2, 3)).reshape(-1)
        for thing in scene.things:
            for index, (x, y) in enumerate(thing.digits):
                parts = thing.parts(index)
                best = parts[0]
                assert (
                    best == int(y) // PATCH * 36 + int(x) // PATCH
                    or (x % TILE < 5 or y % TILE < 5)
                    or (x % TILE > TILE - 5 or y % TILE > TILE - 5)
                )
                near = PATCH / 2 + max(0.5 * thing.height, BORDER) + 1
                for part in parts:
                    row, column = part // 36 * PATCH + PATCH / 2, part % 36 * PATCH + PATCH / 2
                    assert abs(row - y) <= near and abs(column - x) <= near
                assert spread[best] > (10 if style == "photographed" else 14), (seed, thing)  # cameras blur


def test_a_cut_thing_has_a_digit_in_two_tiles():
    """Against the tiles of points all over each digit."""
    across, cut, several = np.linspace(-1, 1, 81), 0, 0
    for seed in range(20):
        for thing in scene_of("usual", seed).things:
            tiles = []
            for x, y in thing.digits:
                columns = (x + across * digits.WIDTH / 2 * thing.height) // TILE
                rows = (y + across * thing.height / 2) // TILE
                tiles.append((len({*columns}), len({*rows})))
            assert thing.cut == any(found != (1, 1) for found in tiles)
            read_in = [{(part // 36 // 12, part % 36 // 12) for part in thing.parts(i)} for i in range(len(tiles))]
            assert thing.cut or all(len(found) == 1 for found in read_in)
            cut, several = cut + thing.cut, several + any(len(found) > 1 for found in read_in)
    assert 8 < several < cut < 60


def test_a_scene_is_its_seeds_and_its_splits():
    one, again = (make_scene(np.random.default_rng(5), "test") for _ in range(2))
    other = make_scene(np.random.default_rng(5), "train")
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image)) and one.things == again.things
    assert [thing.name for thing in other.things] == [thing.name for thing in one.things]
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))  # other forms of the same digits


def test_a_photograph_moves_places_with_the_picture():
    plain = make_scene(np.random.default_rng(1), "test", Style(aspect=1.3))
    moved = make_scene(np.random.default_rng(1), "test", Style(aspect=1.3, photo=True))
    steps = [math.dist(a.centre, b.centre) for a, b in zip(plain.things, moved.things, strict=True)]
    assert 1 < max(steps) < 40
    for before, after in zip(plain.things, moved.things, strict=True):
        assert before.name == after.name and before.number == after.number
        assert len(after.corners) == len(before.corners) and after.corners != before.corners


def test_training_sees_more_ways_to_draw_than_evaluation():
    styles = [varied(np.random.default_rng(seed)) for seed in range(200)]
    assert {style.background for style in styles} == {"light", "dark", "coloured"}
    for name in ("plain", "photo", "quality", "aspect", "drawn"):
        share = np.mean([bool(getattr(style, name)) for style in styles])
        assert 0.1 < share < 0.7, (name, share)


def test_labels_of_patches():
    for seed in range(4):
        scene = scene_of("usual", seed)
        found = labels(scene)
        digits = [(thing, index) for thing in scene.things for index in range(len(thing.number))]
        for thing in scene.things:
            for index in range(len(thing.number)):
                part = thing.parts(index)[0]
                here = [  # one, or two: of a digit that the border of a tile cuts a half stands in the other tile
                    (int(other.number[at]), SINGLE if len(other.number) == 1 else (FIRST, SECOND)[at])
                    for other, at in digits
                    if part in other.parts(at)
                ]
                assert len(here) <= 2 and (found.digit.flat[part], found.place.flat[part]) in here
                assert found.hires_colour.flat[part] in (list(COLOURS).index(thing.colour), NOTHING)
            token = lowres_token(*thing.centre)
            for plane, value in (
                (found.colour, list(COLOURS).index(thing.colour)),
                (found.shape, SHAPES.index(thing.shape)),
            ):
                assert plane.flat[token] in (value, NOTHING) and (plane == value).any()
        assert ((found.digit < 10) == (found.place > 0)).all()
        parts = {part for thing in scene.things for index in range(len(thing.number)) for part in thing.parts(index)}
        assert set(np.flatnonzero(found.digit < 10).tolist()) == parts


def test_packed_questions_point_at_their_digits():
    scenes = [scene_of("usual", seed) for seed in range(4)]
    tokenizer = build_tokenizer()
    described = [(scene.things, scene.image.size) for scene in scenes]
    batch = pack(np.random.default_rng(1), described, 24, tokenizer)
    assert batch.ids.shape[:2] == (4, 24) and batch.where.shape[2] <= READS and batch.parts.shape[3] == PARTS
    aimed, kinds = 0, set()
    for scene, (things, _) in enumerate(described):
        at = {thing.parts(digit)[:PARTS]: (thing, text) for thing in things for digit, text in enumerate(thing.number)}
        places = {lowres_token(*thing.centre) for thing in things}
        for question in range(24):
            ids, where, answer = (part[scene, question].tolist() for part in (batch.ids, batch.where, batch.answer))
            count = sum(token >= 0 for token in answer)
            assert answer[count - 1] == EOS and all(token == -100 for token in answer[count:])
            assert [ids[position] for position in where[1:count]] == answer[: count - 1]
            assert tokenizer.id_to_token(ids[where[0]]) == ":"
            kind = KINDS[int(batch.kind[scene, question])]
            kinds.add(kind)
            for step in range(count):
                parts = tuple(part for part in batch.parts[scene, question, step].tolist() if part >= 0)
                goals = [goal for goal in batch.goals[scene, question, step].tolist() if goal >= 0]
                if not parts:
                    assert set(goals) <= places
                    continue
                thing, digit = at[parts]
                assert goals[0] == parts[0] // 36 // 3 * 12 + parts[0] % 36 // 3
                token = tokenizer.id_to_token(answer[step]).lstrip("\u2581")
                aimed += token == digit
                assert token == digit or not token.isdigit()
                colour, shape = batch.named[scene, question, step].tolist()
                assert colour in (-1, list(COLOURS).index(thing.colour))
                assert shape in (-1, SHAPES.index(thing.shape))
                for value, word in zip((colour, shape), batch.words[scene, question, step].tolist(), strict=True):
                    assert (value >= 0) == (word >= 0) and word < where[0]
            for end, place in zip(
                batch.ends[scene, question].tolist(), batch.places[scene, question].tolist(), strict=True
            ):
                assert (end >= 0) == (place >= 0) and end < where[0] and (place < 0 or place in places | {144})
            if kind == "count":
                said = tokenizer.decode([answer[int(batch.counted[scene, question])]]).strip()
                assert int(said) == int(batch.count[scene, question])
    assert aimed > 30 and len(kinds) >= 9
