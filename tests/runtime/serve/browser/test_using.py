"""The page as people use it: by keyboard, on a phone, in the dark, with other pictures, several questions."""

from __future__ import annotations

import base64
import io
import json
import re
import threading

import numpy as np
import PIL.Image
import pytest
import uvicorn
from playwright.sync_api import expect
from starlette.applications import Starlette
from starlette.routing import Mount

from runtime.serve import app
from tests.runtime.serve.browser.conftest import PHONE
from tests.runtime.serve.browser.visit import ANSWER, POSTER, QUESTION, require_lit

# Texts whose colour is too close to what lies behind them: WCAG's AA, 4.5, or 3 for large ones.
_PALE = """() => {
    const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const found = rgba(getComputedStyle(each).backgroundColor);
            if (found[3] === 255) return found;
        }
        return [255, 255, 255, 255];
    };
    const pale = [];
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        const style = getComputedStyle(element);
        if (!text || !element.checkVisibility() || element.closest(".unseen, .skip, :disabled, .later")) continue;
        const [a, b] = [luminance(rgba(style.color)), luminance(behind(element))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) pale.push(`${element.textContent.trim()}: ${ratio}`);
    }
    return pale;
}"""
# Controls in sight that a thumb would miss: under 44 pixels. Words of an answer are text.
_SMALL = """() => [...document.querySelectorAll("button, input, textarea")]
    .filter((each) => each.checkVisibility())
    .map((each) => [each.getAttribute("aria-label") || each.textContent || each.id, each])
    .map(([name, each]) => [name, (each.closest("label") ?? each).getBoundingClientRect()])
    .filter(([, box]) => box.width < 44 || box.height < 44)
    .map(([name, box]) => `${name}: ${box.width} x ${box.height}`)"""


def test_from_the_first_look_to_the_tokens_by_keyboard_alone(visit, url):
    at = visit(url)
    at.page.get_by_role("button", name="Example picture: poster").wait_for()
    focused = at.page.locator(":focus")
    for _ in range(20):
        at.page.keyboard.press("Tab")
        outline = focused.evaluate("(element) => getComputedStyle(element).outlineStyle")
        assert outline != "none", focused.get_attribute("id")
        if focused.get_attribute("aria-label") == "Example picture: poster":
            break
    at.page.keyboard.press("Enter")
    expect(focused).to_have_attribute("id", "question")
    expect(focused).to_have_value(QUESTION)  # what can be asked is written there already
    at.page.keyboard.press("Enter")
    at.page.locator(".figures:not(:empty)").wait_for()
    assert at.answer() == ANSWER
    for _ in range(10):
        at.page.keyboard.press("Shift+Tab")
        if focused.get_attribute("role") == "option":
            break
    for name in ("“3” read", "“0” read", "“and” read"):
        expect(focused).to_have_accessible_name(re.compile(f"^{name}"))
        assert at.caption().startswith(name)
        at.page.keyboard.press("ArrowRight")
    at.page.keyboard.press("End")
    expect(focused).to_have_accessible_name(re.compile("end"))
    at.page.keyboard.press("Home")
    assert at.caption().startswith("“3” read")
    at.page.keyboard.press("Space")
    expect(at.page.locator("#play")).to_have_text("Pause")
    at.page.keyboard.press("Escape")
    expect(at.page.locator("#play")).to_have_text("Play")
    assert at.caption().startswith("The whole answer read 5 of 81 pages")
    at.page.keyboard.press("ArrowLeft")  # nothing has the focus: the last token
    assert "end" in at.caption()
    at.page.keyboard.press("/")
    expect(focused).to_have_attribute("id", "question")
    at.page.keyboard.type("which number does the orange triangle show?")
    at.page.keyboard.press("Enter")
    expect(at.page.locator(".turn")).to_have_count(2)
    at.page.locator(".figures:not(:empty)").nth(1).wait_for()
    assert at.answer() == "51"


def test_every_control_has_a_name_and_the_answer_is_said_as_a_whole(visit, url):
    at = visit(url)
    for step in ("first", "asked"):
        if step == "asked":
            at.page.get_by_role("button", name="Example picture: poster").click()
            at.ask(QUESTION)
        tree = at.page.locator("body").aria_snapshot()
        nameless = re.findall(r"- (?:button|textbox|slider|option|listbox|img|region|group)(?![\w ]* \")[^\n]*", tree)
        assert not nameless, nameless
        assert re.search("- main", tree) and re.search("- banner", tree) and re.search("- contentinfo", tree)
    said = at.page.locator("[aria-live=polite]")
    read = "The whole answer read 5 of 81 pages, scattered, brightest in row 4, column 6"
    assert said.inner_text() == f"Answer: {ANSWER}. {read}"
    at.tokens().nth(5).click()
    assert said.inner_text().startswith("Answer:")  # looking around is not announced: the focus says it
    light = at.page.get_by_role("img", name="The end of the answer read")
    expect(light).to_be_visible()


def test_on_a_phone(visit, url, pictures):
    at = visit(url, **PHONE)
    example = at.page.get_by_role("button", name="Example picture: poster")
    example.wait_for()
    expect(at.page.get_by_role("button", name="Take a photo")).to_be_visible()
    assert at.page.locator("#camera").get_attribute("capture") == "environment"
    wide = "document.documentElement.scrollWidth - innerWidth"
    assert at.page.evaluate(wide) <= 0 and not at.page.evaluate(_SMALL)
    at.page.screenshot(path=pictures / "phone-first.png")
    example.tap()
    at.page.get_by_role("button", name="Ask", exact=True).tap()
    at.page.locator(".figures:not(:empty)").wait_for()
    assert at.answer() == ANSWER
    at.tokens().nth(4).tap()
    assert at.caption().startswith("“8” read 2 pages")
    assert at.page.evaluate(wide) <= 0 and not at.page.evaluate(_SMALL)
    at.page.screenshot(path=pictures / "phone.png")
    # Wherever one reads, picture and question stay in reach.
    at.page.evaluate("scrollTo(0, 9999)")
    expect(at.page.locator("#light")).to_be_in_viewport(ratio=0.9)
    expect(at.page.get_by_label("Ask about this picture")).to_be_in_viewport(ratio=1)
    picture, question = (at.page.locator(each).bounding_box() for each in ("#look", "#composer"))
    assert picture["y"] + picture["height"] < question["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_by_day_and_by_night(visit, url, pictures, scheme):
    at = visit(url, color_scheme=scheme)
    at.page.get_by_role("button", name="Example picture: poster").wait_for()
    assert not at.page.evaluate(_PALE)
    at.page.get_by_role("button", name="Example picture: poster").click()
    at.ask(QUESTION)
    at.tokens().nth(4).click()
    assert not at.page.evaluate(_PALE)
    at.page.screenshot(path=pictures / f"{scheme}.png")
    paper = at.page.locator("body").evaluate("(body) => getComputedStyle(body).backgroundColor")
    assert (int(re.findall(r"\d+", paper)[0]) < 60) == (scheme == "dark")
    other = "light" if scheme == "dark" else "dark"
    switch = at.page.get_by_role("button", name="Theme")
    while switch.inner_text() != f"Theme: {other}":
        switch.click()
    turned = at.page.locator("body").evaluate("(body) => getComputedStyle(body).backgroundColor")
    assert (int(re.findall(r"\d+", turned)[0]) < 60) == (other == "dark")
    at.page.reload()
    expect(switch).to_have_text(f"Theme: {other}")


def test_a_new_scene_and_its_questions(visit, url):
    at = visit(url)
    at.page.get_by_role("button", name="Draw a new scene").click()
    at.page.wait_for_selector("#stage:not([hidden])", timeout=60_000)  # the first one imports torch
    questions = at.page.locator(".suggestion")
    assert questions.count() >= 3
    questions.first.click()
    at.page.locator(".figures:not(:empty)").wait_for()
    assert re.match(r"✓ right$|The picture says: \d+$", at.page.locator(".remark").inner_text())
    picture = at.page.locator("#picture").get_attribute("alt")
    at.page.get_by_role("button", name="Draw a new scene").click()
    expect(at.page.locator("#picture")).not_to_have_attribute("alt", picture)
    expect(at.page.locator(".turn")).to_have_count(0)


def test_a_suggested_follow_up_asks_what_comes_before_it(visit, url):
    at, asked = visit(url), []
    at.page.on("request", lambda request: asked.append(request.post_data_json) if request.post_data else None)
    at.page.get_by_role("button", name="Example picture: tower").click()
    at.page.get_by_role("button", name="what number is in the red diamond? … and in the yellow one?").click()
    at.page.locator(".figures:not(:empty)").nth(1).wait_for()
    expect(at.page.locator(".turn")).to_have_count(2)
    first, second = (request["messages"] for request in asked)
    assert [message["role"] for message in second] == ["user", "assistant", "user"] and len(first) == 1
    assert json.dumps(second[0]).count("what number is in the red diamond?") == 1
    assert "and in the yellow one?" in json.dumps(second[2])
    at.page.get_by_role("button", name="read the number on the green triangle.").click()
    at.page.locator(".figures:not(:empty)").nth(2).wait_for()
    assert len(asked[2]["messages"]) == 1  # what is no follow-up is still asked alone


def test_a_picture_is_pasted_or_chosen(visit, url):
    at = visit(url)
    with at.page.expect_file_chooser() as chooser:
        at.page.get_by_role("button", name="Choose a picture").click()
    chooser.value.set_files(POSTER)
    assert at.ask(QUESTION) == ANSWER
    at.page.locator("body").evaluate(
        """async (body) => {
            const canvas = new OffscreenCanvas(60, 40);
            canvas.getContext("2d").fillRect(0, 0, 9, 9);
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([await canvas.convertToBlob()], "image.png", { type: "image/png" }));
            body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }"""
    )
    expect(at.page.locator("#picture")).to_have_attribute("alt", "The picture you ask about: image.png")
    expect(at.page.locator(".turn")).to_have_count(0)  # another picture, another conversation


def test_a_large_picture_is_made_smaller_and_said_so(visit, url):
    large = io.BytesIO()
    PIL.Image.open(POSTER).resize((3780, 5040), PIL.Image.Resampling.BICUBIC).save(large, "JPEG", quality=90)
    at = visit(url)
    at.drop(large.getvalue(), "large.jpg", "image/jpeg")
    note = at.page.get_by_text("Made smaller before it is sent (3780 x 5040")
    expect(note).to_be_visible()
    width, height = (int(each) for each in re.search(r"to (\d+) x (\d+)", note.inner_text()).groups())
    assert 11.9e6 < width * height <= 12e6 and abs(width / height - 3 / 4) < 0.001
    assert at.ask(QUESTION) == ANSWER


def test_what_the_server_does_not_read_is_sent_as_this_browser_shows_it(visit, url):
    poster = PIL.Image.open(POSTER).convert("RGB")
    moving, tall = io.BytesIO(), io.BytesIO()
    poster.save(moving, "GIF", save_all=True, append_images=[poster.rotate(180)])
    poster.resize((600, 20_000)).save(tall, "JPEG")  # few pixels, and one side of more than is read
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"><rect width="9" height="9"/></svg>'
    at = visit(url)
    for data, name, kind, note in [
        (moving.getvalue(), "moving.gif", "image/gif", "Sent as a still picture"),
        (drawing, "drawing.svg", "image/svg+xml", "Sent as a still picture"),
        (tall.getvalue(), "tall.jpg", "image/jpeg", "to 491 x 16384"),
    ]:
        at.drop(data, name, kind)
        expect(at.page.locator("#note")).to_contain_text(note)
        expect(at.page.locator("#picture")).to_have_attribute("alt", f"The picture you ask about: {name}")
        answer = at.ask(QUESTION)
        assert answer and (name != "moving.gif" or answer == ANSWER)


def test_a_picture_that_is_there_late_takes_nobodys_place(visit, url):
    at = visit(url)
    held = []
    at.page.route("**/flex/scene*", lambda route: held.append(route))
    at.page.get_by_role("button", name="Draw a new scene").click()
    expect(at.page.get_by_role("button", name="Drawing")).to_be_visible()
    at.drop_poster()
    assert at.ask(QUESTION) == ANSWER
    pixel = base64.b64encode(POSTER.read_bytes()).decode()
    held[0].fulfill(json={"seed": 1, "image": f"data:image/png;base64,{pixel}", "questions": []})
    expect(at.page.get_by_role("button", name="Draw a new scene")).to_be_enabled()
    expect(at.page.locator("#picture")).to_have_attribute("alt", "The picture you ask about: poster.png")
    expect(at.page.locator(".turn")).to_have_count(1)


def test_what_is_no_picture_is_told(visit, url):
    at = visit(url)
    at.drop(b"ftypheic, says who sent it", "holiday.heic", "image/heic")
    problem = at.page.get_by_role("alert")
    expect(problem).to_contain_text("This browser cannot show holiday.heic (image/heic).")
    expect(problem).to_contain_text("Expected: PNG, JPEG")
    expect(problem).to_contain_text("Save it as a PNG or JPEG")
    problem.get_by_role("button", name="Dismiss").click()
    expect(problem).to_be_hidden()


def test_follow_ups_are_sent_with_what_was_said(visit, url, engine):
    at = visit(url)
    at.drop_poster()
    sent = []
    at.page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json["messages"]))
    follow_up = "which number does the orange triangle show?"
    assert at.ask(QUESTION) == ANSWER
    at.page.get_by_label("As a follow-up: send the question before along").check()
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    expected = engine.generate(POSTER, [*said, {"role": "user", "content": follow_up}], trace=True)
    assert at.ask(follow_up) == expected.text
    require_lit(at.opacity(), expected.trace.cells[:, :-1].mean(1).max(0).ravel())
    assert [each["role"] for each in sent[1]] == ["user", "assistant", "user"]
    assert sent[1][0] == sent[0][0] and sent[1][1:] == [said[1], {"role": "user", "content": follow_up}]
    at.page.get_by_label("As a follow-up: send the 2 questions before along").uncheck()
    assert at.ask(follow_up) == engine.generate(POSTER, follow_up).text
    assert len(sent[2]) == 1 and sent[2][0]["content"][1]["text"] == follow_up


def test_a_conversation_that_is_too_long_can_go_on(visit, url):
    at = visit(url)
    at.may_fail = True
    at.drop_poster()
    problem = at.page.get_by_role("alert")
    assert at.ask(QUESTION) == ANSWER
    at.page.get_by_label("As a follow-up").check()
    for _ in range(25):
        answers = at.page.locator(".figures:not(:empty)").count()
        at.page.get_by_label("Ask about this picture").fill(QUESTION)
        at.page.get_by_role("button", name="Ask", exact=True).click()
        at.page.locator(f"#problem:not([hidden]), .turn:nth-child({answers + 1}) .figures:not(:empty)").first.wait_for()
        if problem.is_visible():
            break
    expect(problem).to_contain_text("a conversation of")
    expect(problem).to_contain_text("Expected: at most")
    problem.get_by_role("button", name="Ask without the earlier turns").click()
    expect(problem).to_be_hidden()
    at.page.locator(".figures:not(:empty)").nth(answers).wait_for()
    assert at.answer() == ANSWER


def test_where_the_model_takes_no_conversation_each_question_is_asked_alone(visit, url):
    at = visit("about:blank")
    sent = []

    def models(route) -> None:
        listed = route.fetch().json()
        listed["data"][0]["flex"]["conversation"] = False
        route.fulfill(json=listed)

    at.page.route("**/v1/models", models)
    at.page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json["messages"]))
    at.url = url
    at.open()
    at.drop_poster()
    for question in (QUESTION, "which number does the orange triangle show?"):
        at.ask(question)
        assert len(sent[-1]) == 1 and sent[-1][0]["content"][1]["text"] == question
    expect(
        at.page.get_by_text("Each question is asked alone: this model was not made for conversations.")
    ).to_be_visible()


def test_a_large_model_and_a_long_answer_on_a_narrow_phone(visit, url, pictures):
    """23 layers, 40 words: what the default model never says is played to the page."""
    layers, words = list(range(9, 32)), [f" word{index}" for index in range(40)]

    def chunk(content: str, flex: dict, end: str | None = None) -> str:
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": end}
        return f"data: {json.dumps({'choices': [choice], 'flex': flex})}\n\n"

    def models(route) -> None:
        listed = route.fetch().json()
        listed["data"][0]["flex"]["layers"] = layers
        route.fulfill(json=listed)

    head = {"grid": 9, "layers": layers, "image": {"width": 378, "height": 504}}
    stats = {"first_token_ms": 8123, "tokens_per_second": 3.2, "pages_read": 1, "page_bytes": 480_000_000}
    cells = [[[index], *([[]] * 22)] for index in range(40)]  # one layer of 23 reads one page
    stream = [
        chunk("", head),
        *(chunk(word, {"token": 5, "cells": each}) for word, each in zip(words, cells, strict=True)),
    ]
    stream += [chunk("", {"stats": stats | {"view_cached": False}}, "length"), "data: [DONE]\n\n"]
    at = visit("about:blank", **{**PHONE, "viewport": {"width": 320, "height": 640}})
    at.page.route("**/v1/models", models)
    at.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body="".join(stream))
    )
    at.url = url
    at.open()
    at.drop_poster()
    assert at.ask("what is there?") == "".join(words).strip()
    assert "Cut off" in at.page.locator(".remark").inner_text()
    assert at.page.locator(".figures").inner_text().startswith("first token 8.1 s · 3 tokens/s")
    at.tokens().nth(31).tap()
    share = np.zeros(81)
    share[31] = 1 / 23
    require_lit(at.opacity(), share)  # one layer of many can be seen
    assert at.caption() == "“word31” read 0.04 pages per layer, row 4, column 5"
    assert at.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert not at.page.evaluate(_SMALL)
    at.page.screenshot(path=pictures / "narrow.png")


def test_below_the_path_of_another_app(visit, engine):
    config = uvicorn.Config(
        Starlette(routes=[Mount("/below/here", app(engine))]), port=0, log_level="error", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        at = visit(f"http://127.0.0.1:{port}/below/here/")
        at.page.get_by_role("button", name="Example picture: poster").click()
        assert at.ask(QUESTION) == ANSWER
        at.page.context.close()
    finally:
        server.should_exit = True
        thread.join(30)
