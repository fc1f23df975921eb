"""What lights up is what was read: the cells of the page's light against those of the engine's trace."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import expect

from tests.paths import ROOT
from tests.runtime.serve.browser.visit import ANSWER, POSTER, QUESTION, require_lit


def shares(answer, layers=slice(None)) -> np.ndarray:
    """[T, C * C]: the share of these reading layers that read each cell; the last selection is never read."""
    return answer.trace.cells[:, :-1][:, layers].mean(1).reshape(len(answer.token_ids), -1)


def test_a_dropped_picture_lights_up_where_it_was_read(visit, url, engine, pictures):
    at = visit(url)
    at.page.get_by_role("button", name="Example picture").first.wait_for()
    at.page.screenshot(path=pictures / "first.png")
    copy, poster = io.BytesIO(), PIL.Image.open(POSTER)
    poster.putpixel((3, 3), (200, 200, 200))  # a picture that no other test has asked about
    poster.save(copy, "PNG")
    at.drop(copy.getvalue(), "copy.png", "image/png")
    assert at.ask(QUESTION) == ANSWER
    expected = shares(engine.generate(copy.getvalue(), QUESTION, trace=True))
    assert at.tokens().count() == len(expected)
    require_lit(at.opacity(), expected.max(0))  # the whole answer
    for index, share in enumerate(expected):
        at.tokens().nth(index).hover()
        require_lit(at.opacity(), share)
        at.tokens().nth(index).click()
        require_lit(at.opacity(), share)
    assert at.caption().startswith("The end of the answer read")
    at.tokens().first.click()
    assert at.caption() == "“3” read 1 page per layer, row 4, column 6"
    at.page.keyboard.press("Escape")
    require_lit(at.opacity(), expected.max(0))
    figures = at.page.locator(".figures").inner_text()
    assert "1.8 of 81 pages per layer" in figures and "first token" in figures and "already known" not in figures
    # The second question sees the same picture: no vision again. The first answer can still be looked at.
    assert at.ask("which number does the orange triangle show?") == "51"
    assert "image already known" in at.page.locator(".figures").last.inner_text()
    second = shares(engine.generate(copy.getvalue(), "which number does the orange triangle show?", trace=True))
    require_lit(at.opacity(), second.max(0))
    at.page.locator(".turn").first.get_by_role("option").first.click()
    require_lit(at.opacity(), expected[0])


def test_layers_are_switched_one_by_one(visit, url, engine):
    """On an answer whose layers read different pages."""
    question, picture = "read the number on the green triangle.", ROOT / "examples/tower.png"
    answer = engine.generate(picture, question, trace=True)
    at = visit(url)
    at.page.get_by_role("button", name="Example picture: tower").click()
    at.ask(question)
    at.tokens().first.click()
    require_lit(at.opacity(), shares(answer)[0])
    button = {layer: at.page.get_by_role("button", name=f"Layer {layer}", exact=True) for layer in (3, 4, 5)}
    button[4].click()
    require_lit(at.opacity(), shares(answer, [0, 2, 3, 4])[0])
    assert button[4].get_attribute("aria-pressed") == "false" and button[3].get_attribute("aria-pressed") == "true"
    button[3].click()
    require_lit(at.opacity(), shares(answer, [2, 3, 4])[0])
    at.page.get_by_role("button", name="All layers off").click()
    require_lit(at.opacity(), np.zeros(81))
    assert "every layer is switched off" in at.caption()
    at.page.get_by_role("button", name="All layers on").click()
    require_lit(at.opacity(), shares(answer)[0])


@pytest.mark.parametrize("budget", [0, 1])
def test_the_page_budget_changes_what_is_read(visit, url, engine, budget):
    at = visit(url)
    at.drop_poster()
    at.page.get_by_label("Page budget").fill(str(budget))
    assert f"{budget} of 81" in at.page.locator("#budget-row").inner_text()
    answer = engine.generate(POSTER, QUESTION, trace=True, page_budget=budget)
    assert at.ask(QUESTION) == answer.text
    read = shares(answer)
    assert read.sum(1).max() == budget
    at.tokens().last.click()
    require_lit(at.opacity(), read[-1])
    if not budget:
        assert "read no page" in at.caption()


def test_a_photo_lies_as_the_browser_shows_it(visit, url, engine):
    """Stored on its side, as phones do: shown upright, and lit where it is shown."""
    stored = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    image = PIL.Image.open(POSTER).convert("RGB").transpose(PIL.Image.Transpose.ROTATE_90)
    image.save(stored, "JPEG", quality=98, exif=exif)
    at = visit(url)
    at.drop(stored.getvalue(), "photo.jpg", "image/jpeg")
    answer = engine.generate(stored.getvalue(), QUESTION, trace=True)
    assert at.ask(QUESTION) == answer.text == ANSWER
    box = at.page.locator("#light").bounding_box()
    assert box["height"] > 1.3 * box["width"]
    require_lit(at.opacity(), shares(answer).max(0))


def test_the_answer_is_replayed(visit, url, engine):
    """With motion: token by token to the whole answer, and held where it is paused."""
    at = visit(url, reduced_motion="no-preference")
    at.drop_poster()
    assert at.ask(QUESTION) == ANSWER
    time = at.page.get_by_label("Token of the answer")
    expect(time).to_have_value("6")  # comes to rest on the whole answer
    seen = at.page.evaluate(
        """() => new Promise((resolve) => {
            const seen = [], time = document.getElementById("time");
            document.getElementById("play").click();
            const watch = setInterval(() => {
                if (seen.at(-1) !== time.value) seen.push(time.value);
                if (time.value === "3") document.getElementById("play").click(), clearInterval(watch), resolve(seen);
            }, 10);
        })"""
    )
    assert seen == ["0", "1", "2", "3"]
    at.page.wait_for_timeout(800)  # longer than a token is shown
    assert time.input_value() == "3" and at.page.get_by_role("button", name="Play").is_visible()
    require_lit(at.opacity(), shares(engine.generate(POSTER, QUESTION, trace=True))[3])
    at.page.get_by_role("button", name="Play").click()
    expect(time).to_have_value("6")
    at.page.get_by_role("button", name="Play").wait_for()
    time.fill("1")
    assert at.caption().startswith("“0”")


def test_pointing_at_the_picture_tells_who_read_there(visit, url):
    at = visit(url)
    at.drop_poster()
    at.ask(QUESTION)
    box = at.page.locator("#light").bounding_box()
    side = max(box["width"], box["height"])
    x = box["x"] + (5.5 / 9) * side - (side - box["width"]) / 2
    at.page.mouse.move(x, box["y"] + (3.5 / 9) * side)
    assert at.caption() == "Row 4, column 6: read for “3”, “0”, “and”"
    assert at.page.locator(".token.reader").all_inner_texts() == ["3", "0", "and"]
    at.page.mouse.move(x, box["y"] + (7.5 / 9) * side)
    assert at.caption().endswith("not read") and not at.page.locator(".token.reader").count()


def test_the_picture_to_send(visit, url, pictures):
    at = visit(url, permissions=["clipboard-read", "clipboard-write"])
    at.drop_poster()
    at.ask(QUESTION)
    with at.page.expect_download() as download:
        at.page.get_by_role("button", name="Save picture").click()
    assert download.value.suggested_filename == "where-it-looks.png"
    download.value.save_as(pictures / "card.png")
    at.page.get_by_role("button", name="Copy picture").click()
    at.page.get_by_role("button", name="Copied").wait_for()
    copied = at.page.evaluate("navigator.clipboard.read().then(([item]) => item.types)")
    assert copied == ["image/png"]
    card = np.asarray(PIL.Image.open(pictures / "card.png").convert("RGB")).astype(int)
    assert 800 < card.shape[1] <= 1200 and card.shape[0] > card.shape[1]
    warm = (abs(card - (255, 178, 36)).sum(-1) < 40).mean()
    assert 0.0005 < warm < 0.1  # edges of what was read, on the picture and on the small ones
