"""Digits, scenes, questions and their labels say the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.default_model import digits
from export.default_model.packing import EOS, READS, pack
from export.default_model.pool import NOTHING, labels, lowres, padded
from export.default_model.questions import KINDS, TEMPLATE, ask, build_tokenizer
from export.default_model.scenes import CANVAS, COLOURS, SHAPES, make_scene


def test_splits_share_no_sample():
    seen = [{image.numpy().tobytes() for image in digits.samples(split)[0]} for split in digits.SPLITS]
    assert sum(len(digits.samples(split)[0]) for split in digits.SPLITS) == 1797
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    for split in digits.SPLITS:
        assert set(digits.samples(split)[1].tolist()) == set(range(10))


def test_the_lowres_view_sees_little_of_a_digit(monkeypatch):
    images, _ = digits.samples("train")
    where = torch.stack((torch.arange(200) % 3, torch.arange(200) // 3 % 3), 1) + 168

    def left(hide: float) -> float:
        monkeypatch.setattr(digits, "HIDE", hide)
        canvas = torch.zeros(200, CANVAS, CANVAS, 1)
        patches = digits.draw(images[:200], where, torch.Generator().manual_seed(0))
        for index, (row, column) in enumerate(where.tolist()):
            canvas[index, row : row + 14, column : column + 14, 0] = patches[index]
        return float(torch.cat([lowres(part) for part in canvas.split(50)]).abs().amax())

    assert left(1.0) < 1e-5  # all that the reduction sees is taken out
    assert left(0.9) < 0.25 * left(0.0)


@pytest.mark.parametrize("aspect", [0.6, 1.0, 1.6, None])
def test_scenes_are_as_described(aspect):
    for seed in range(6):
        scene = make_scene(np.random.default_rng(seed), "test", aspect=aspect)
        width, height = scene.image.size
        assert max(width, height) == CANVAS and 0.59 <= width / height <= 1.61
        assert len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things) >= 2
        pixels = padded(scene.image).astype(float)
        for thing in scene.things:
            assert thing.colour in COLOURS and thing.shape in SHAPES and len(thing.cells) == len(thing.number)
            for row, column in thing.cells:  # grey plate with dark ink and bright halo
                patch = pixels[row * 14 + 1 : row * 14 + 13, column * 14 + 2 : column * 14 + 12].mean(-1)
                assert 130 < patch.mean() < 170 and patch.min() < 110 and patch.max() > 180
    again = make_scene(np.random.default_rng(5), "test", aspect=aspect)
    assert np.array_equal(np.asarray(again.image), np.asarray(scene.image)) and again.things == scene.things


def test_labels_of_patches():
    scene = make_scene(np.random.default_rng(2))
    found = labels(scene)
    assert (found.digit < 10).sum() == sum(len(thing.number) for thing in scene.things)
    for thing in scene.things:
        text = "".join(str(found.digit[row, column]) for row, column in thing.cells)
        places = [int(found.place[row, column]) for row, column in thing.cells]
        assert text == thing.number and places == ([1] if len(text) == 1 else [2, 3])
        row, column = thing.cells[0]
        assert found.plate[row // 3, column // 3] == 1
        for plane, value in (
            (found.colour, list(COLOURS).index(thing.colour)),
            (found.shape, SHAPES.index(thing.shape)),
        ):
            assert plane[row // 3, column // 3] in (value, NOTHING)
            assert (plane == value).any()


def test_answers_are_true():
    rng = np.random.default_rng(0)
    counted = dict.fromkeys(KINDS, 0)
    for seed in range(30):
        things = make_scene(np.random.default_rng(seed)).things
        numbers = {(thing.colour, thing.shape): thing.number for thing in things}
        for kind in KINDS:
            question = ask(rng, things, kind)
            counted[kind] += 1
            if kind in ("one", "two"):
                assert question.answer == " and ".join(numbers[mention] for mention in question.mentions)
            elif kind == "yes/no":
                assert question.answer == ("yes" if question.mentions[0] in numbers else "no")
            else:
                words = question.text.strip("?.").split()
                what = words[1:] if words[0] == "count" else words[2:]
                colour = [thing for thing in things if thing.colour in what] if set(what) & set(COLOURS) else things
                shape = [thing for thing in colour if f"{thing.shape}s" in what]
                assert question.answer == str(len(shape) if any(f"{s}s" in what for s in SHAPES) else len(colour))
            for colour, shape in question.mentions:
                assert f"{colour} {shape}" in question.text
    assert set(counted.values()) == {30}


def test_tokenizer_covers_the_questions():
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab_size() < 256
    rng = np.random.default_rng(0)
    for seed in range(20):
        things = make_scene(np.random.default_rng(seed)).things
        for kind in KINDS:
            question = ask(rng, things, kind)
            encoded = tokenizer.encode(
                TEMPLATE.split("<image>")[1].format(prompt=question.text), add_special_tokens=False
            )
            assert 0 not in encoded.ids and all(len(token) != 1 or token in ".?:" for token in encoded.tokens)
            answer = tokenizer.encode(question.answer, add_special_tokens=False).ids
            assert tokenizer.decode(answer) == question.answer
    assert tokenizer.decode(tokenizer.encode("Zebra, quickly!", add_special_tokens=False).ids) == "zebra, quickly!"


def test_packed_questions_point_at_their_digits():
    scenes = [make_scene(np.random.default_rng(seed)).things for seed in range(4)]
    tokenizer = build_tokenizer()
    batch = pack(np.random.default_rng(1), scenes, 12, tokenizer, {})
    assert batch.ids.shape == (4, 12, 28) and batch.where.shape == (4, 12, READS)
    aimed = 0
    for scene, things in enumerate(scenes):
        at = {
            row * 36 + column: (thing, digit)
            for thing in things
            for (row, column), digit in zip(thing.cells, thing.number, strict=True)
        }
        for question in range(12):
            ids, where, answer = (part[scene, question].tolist() for part in (batch.ids, batch.where, batch.answer))
            count = sum(token >= 0 for token in answer)
            assert answer[count - 1] == EOS
            assert [ids[position] for position in where[1:count]] == answer[: count - 1]
            assert tokenizer.id_to_token(ids[where[0]]) == ":"
            for step in range(count):
                target = int(batch.target[scene, question, step])
                token = tokenizer.id_to_token(answer[step]).lstrip("\u2581")
                words = [
                    tokenizer.id_to_token(ids[place])
                    for place in batch.words[scene, question, step].tolist()
                    if place >= 0
                ]
                if target >= 0:
                    thing, digit = at[target]
                    assert words == [f"\u2581{thing.colour}", f"\u2581{thing.shape}"]
                    if token.isdigit():
                        assert digit == token
                        aimed += 1
    assert aimed > 30
