"""What the default model can do: `python -m export.default_model.evaluate`.

Fresh scenes with digits that training never saw, answered by `runtime.Engine`. One table: rows are ways to look,
columns the kinds of questions; then probes, which move away from what training showed. With --write it leaves the
scenes in a folder instead, for `python -m runtime.evaluate scenes` to ask any bundle about them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from engines.backend import Image
from engines.bundle.pages import margins
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.default_model.questions import KINDS, Question, ask, build_tokenizer
from export.default_model.scenes import Scene, Style, make_scene
from export.network.reference import ReferenceModel
from plugins import command
from runtime import Answer, Engine
from runtime.preprocess import preprocess
from runtime.text.conversation import Conversation, History, Prompt

ASKED = dict.fromkeys(KINDS, 1) | {"one": 2, "two": 2, "count": 2}  # questions per scene
PAGE_BUDGETS = (1, 2, 4, 8)
AT_ONCE = {"slots": 8, "threads": 1}  # of an engine: a model as small as this gains nothing from a second thread
TOKENS = 16  # an answer has fewer
PROBES = {
    "aspect 2:1": Style(aspect=2.0),
    "aspect 1:2": Style(aspect=0.5),
    "double clutter": Style(clutter=2.0),
    "dark background": Style(background="dark"),
    "JPEG, quality 60": Style(quality=60),
    "a photographed screen": Style(photo=True),
    "plain ink": Style(plain=True),
    "gradients, shadows, paper": Style(plain=True, drawn=True),
}
Asked = list[tuple[Scene, list[Question]]]


@dataclass
class Tally:
    """What one row of the table counts."""

    right: dict[str, list[bool]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    pages: list[float] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    decided: list[bool] = field(default_factory=list)  # comparisons: are the last words, who wins, right?
    single: dict[bool, list[bool]] = field(default_factory=lambda: {True: [], False: []})  # one number: a tile cuts it?

    def add(self, question: Question, scene: Scene, answer: Answer) -> None:
        """Count a traced answer."""
        self.right[question.kind].append(answer.text == question.answer)
        self.pages.append(float(answer.stats.pages_read.mean()))
        if question.kind == "compare":
            self.decided.append(answer.text.split(", ")[-1] == question.answer.split(", ")[-1])
        if question.kind == "one":
            self.single[scene.things[question.about[0]].cut].append(answer.text == question.answer)
        if question.kind not in ("one", "two"):
            return
        tokens = build_tokenizer().encode(question.answer, add_special_tokens=False)
        for offset, thing, digit in question.reads:
            step = next(i for i, (first, last) in enumerate(tokens.offsets) if first <= offset < last)
            if answer.token_ids[:step] != tokens.ids[:step]:  # the model is somewhere else
                continue
            parts = np.array(scene.things[thing].parts(digit), np.int64)  # none if a tile's border cuts it in halves
            if len(parts):
                self.found.append(bool(answer.trace.cells[step, :-1, parts // 36 // 4, parts % 36 // 4].any()))

    def row(self) -> list[str]:
        """Cells of the table."""
        shares = [f"{100 * np.mean(self.right[kind]):.1f}" if self.right[kind] else "-" for kind in KINDS]
        recall = f"{100 * np.mean(self.found):.1f}" if self.found else "-"
        return [*shares, f"{np.mean(self.pages):.1f}", recall]

    def sentences(self) -> list[str]:
        """What else is worth knowing, of the kinds that were asked."""
        said = []
        if all(self.single.values()):
            cut, whole = (100 * np.mean(self.single[key]) for key in (True, False))
            said.append(f"Of single numbers that a tile's border cuts {cut:.1f} % are right, of others {whole:.1f} %.")
        if self.decided:
            said.append(f"Of comparisons {100 * np.mean(self.decided):.1f} % say rightly who wins.")
        return said


def scenes_with_questions(count: int, seed: int, style: Style | None = None, wording: str = "train") -> Asked:
    """Fresh scenes with test digits, and questions about them."""
    made = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = make_scene(rng, "test", style)
        kinds = [kind for kind, times in ASKED.items() for _ in range(times)]
        asked = [ask(rng, scene.things, scene.image.size, kind, wording=wording) for kind in kinds]
        made.append((scene, [question for question in asked if question is not None]))
    return made


def prompt(question: Question) -> Prompt:
    """A question with what was said before it, as the engine takes it."""
    return Conversation(question.text, History(question.history)).prompt


def write(folder: Path, asked: Asked) -> None:
    """Leave scenes and questions in a folder, made if need be, in the layout of runtime/evaluate/scenes.py."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (scene, questions) in enumerate(asked):
        name = f"{index:04d}.png"
        scene.image.save(folder / name)
        rows += [
            {"image": name, "question": question.text, "answer": question.answer, "kind": question.kind}
            for question in questions
            if not question.history  # that layout has no conversations
        ]
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


def measure(engine: Engine, asked: Asked, page_budget: int | None, name: str) -> Tally:
    """Ask every question; `page_budget`: pages per layer, None = the bundle's."""
    tally = Tally()
    pairs = [(scene, question) for scene, questions in asked for question in questions]
    requests = [(scene.image, prompt(question)) for scene, question in pairs]
    print(name, file=sys.stderr)
    options = {"page_budget": page_budget, "max_new_tokens": TOKENS, "trace": True}
    for (scene, question), answer in zip(pairs, engine.generate_many(requests, progress=True, **options), strict=True):
        tally.add(question, scene, answer)
    return tally


def reference_agrees(engine: Engine, model: Path, asked: Asked) -> tuple[int, int]:
    """(answers that equal the float32 PyTorch reference's token for token, answers)."""
    config = read_config(model)
    g = config.geometry
    reference = ReferenceModel(g, Checkpoint.open(model, config.tower_folder))
    equal = total = 0
    for scene, questions in track(asked, "reference", console=Console(stderr=True), transient=True):
        tiles = preprocess(scene.image, g)
        low, high = reference.vision(tiles[:1]), reference.vision(tiles[1:])
        sides = np.array([margins(*scene.image.size, g.grid)], np.int64)
        with engine.image(scene.image) as view:
            for question in questions:
                ids, begin = engine.prompter.expand(engine.prompter.encode(question.text, True), True)
                position = np.array([begin])
                image = Image(low, reference.project(high, position), position, sides)
                decoder = reference.decoder(image, len(ids) + TOKENS)
                decoder.run(ids[None, :-1])
                tokens: list[int] = []
                token = int(ids[-1])
                while len(tokens) < TOKENS and token not in config.eos_token_ids:
                    token = int(decoder.run(np.array([[token]]), g.pages).logits.argmax())
                    tokens.append(token)
                equal += tokens == view.ask(question.text, max_new_tokens=TOKENS).token_ids
                total += 1
    return equal, total


def evaluate(model: Path, baseline: Path, count: int, seed: int) -> tuple[list[list[str]], str]:
    """The table, heading first, and sentences: `Tally.sentences`, agreement with the reference."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = build(BuildOptions(model, folder / "default")).path
        everything = shutil.copytree(model, folder / "everything-model")
        config = json.loads((everything / "config.json").read_text())
        config["extra"]["threshold"] = "-1"
        (everything / "config.json").write_text(json.dumps(config))
        engine, asked = Engine(bundle, **AT_ONCE), scenes_with_questions(count, seed)
        half = asked[: max(1, count // 2)]
        rows = {"low-res only: a model trained without hi-res": measure_with(baseline, folder / "b", half, 0)}
        rows["low-res only: this model, hi-res off"] = measure(engine, half, 0, "off")
        shipped = rows["**FlexAttention, as shipped**"] = measure(engine, asked, None, "as shipped")
        for page_budget in PAGE_BUDGETS:
            name = f"page budget {page_budget}"
            rows[name] = measure(engine, half, page_budget, name)
        # Compared with the row as shipped, from which it differs by a few answers: of all scenes, as that one.
        rows["all 81 pages"] = measure_with(everything, folder / "e", asked, None)
        fresh = scenes_with_questions(max(1, count // 2), seed + 1, wording="held out")
        rows["wordings that training never showed"] = measure(engine, fresh, None, "wordings")
        for probe, style in PROBES.items():
            fresh = scenes_with_questions(max(1, count // 2), seed + 2, style)
            rows[f"probe: {probe}"] = measure(engine, fresh, None, probe)
        exact = Engine(build(BuildOptions(model, folder / "fp32", precision="fp32")).path)
        few = [(scene, [q for q in questions if not q.history]) for scene, questions in asked[: max(1, count // 5)]]
        said = [f"As shipped: {sentence}" for sentence in shipped.sentences()]
        agree = "Engine and PyTorch reference (float32) give the same tokens for {} of {} answers"
        agree = agree.format(*reference_agrees(exact, model, few))
        said.append(agree + ", the float16 engine for {} of {}.".format(*reference_agrees(engine, model, few)))
    return [["", *KINDS, "pages", "recall"], *([name, *tally.row()] for name, tally in rows.items())], " ".join(said)


def measure_with(model: Path, folder: Path, asked: Asked, page_budget: int | None) -> Tally:
    """Build a checkpoint and measure it."""
    return measure(Engine(build(BuildOptions(model, folder)).path, **AT_ONCE), asked, page_budget, folder.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=BuildOptions.model, help="the trained checkpoint")
    parser.add_argument("--baseline", type=Path, default=Path("checkpoints/lowres-only"), help="its low-res twin")
    parser.add_argument("--scenes", type=int, default=150, help="fresh scenes, 14 questions each; most rows take half")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--write", type=Path, metavar="DIR", help="only leave the scenes and questions in this folder")
    given = parser.parse_args()
    if given.write is not None:
        write(given.write, scenes_with_questions(given.scenes, given.seed))
        return
    rows, sentence = evaluate(given.model, given.baseline, given.scenes, given.seed)
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    print("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]))
    print(f"\n{given.scenes} scenes, seed {given.seed}. {sentence}")


if __name__ == "__main__":
    sys.exit(command.run(main))
