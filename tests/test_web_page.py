"""The web page in a real browser, in front of the real service.

`SCREENSHOTS=docs/images pytest tests/test_web_page.py -k everybody` writes what the page looks like.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.edge import Edge
from tests.conftest import ROOT, missing

playwright = pytest.importorskip("playwright.sync_api", reason="scripts/setup dev installs it")
Page = playwright.Page
expect = playwright.expect

pytestmark = [pytest.mark.server, pytest.mark.slow]

CAT, COFFEE, ROCKET = (ROOT / f"samples/{name}.jpg" for name in ("cat", "coffee", "rocket"))
PHONE, DESKTOP = {"width": 375, "height": 812}, {"width": 1280, "height": 900}
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
).split()
SECONDS = 1000
expect.set_options(timeout=60 * SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        missing("Chromium is missing: install it, on Debian `apt-get install chromium`")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=SWITCHES)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, edge: Edge) -> Iterator[Callable[..., Any]]:
    """Open the page. Afterwards no request may have left its origin, and nothing may have been complained about."""
    contexts, foreign, complaints = [], [], []

    def judge(message: Any) -> None:
        # The browser's own line for an answer with an error status is no complaint about the page.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    def opened(viewport: dict[str, int] = DESKTOP, path: str = "/", **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, permissions=["clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: None if r.url.startswith((edge.url, "blob:", "data:")) else foreign.append(r.url))
        page.on("console", judge)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("filechooser", lambda _: None)  # from the start: the browser must know before it would show one
        page.goto(edge.url + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not foreign
    assert not complaints


def photo(page: Any, place: int = 1) -> Any:
    return page.locator(f"#photos > li:nth-child({place})")


def captioned(page: Any, *files: Path) -> Any:
    """The first of the photos after all of them are captioned."""
    page.set_input_files("#files", files)
    for place in range(1, len(files) + 1):
        expect(photo(page, place).locator(".done")).to_be_visible()
    return photo(page)


def serious(page: Any) -> list[str]:
    """What axe-core finds that would keep somebody from using the page."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["375", "1280"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_photo_is_captioned_and_everybody_can_use_it(
    open_page: Any, edge: Edge, viewport: dict[str, int], scheme: str
) -> None:
    page = open_page(viewport, color_scheme=scheme)
    assert not serious(page)
    first = captioned(page, CAT)
    with CAT.open("rb") as file:
        answer = requests.post(f"{edge.url}/predict?num_captions=3", files={"image": file}, timeout=60).json()
    wanted = [caption["caption"] for caption in answer["captions"]]
    assert [text.lower() for text in first.locator(".sentence").all_inner_texts()] == wanted
    assert first.locator(".percent").first.inner_text() == f"{round(answer['captions'][0]['confidence'] * 100)}% sure"
    assert first.locator(".facts").inner_text() == "451 × 300, JPEG"
    assert first.locator(".preview").get_attribute("alt") == f"{wanted[0].capitalize()}."
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1 * SECONDS)  # until nothing moves
        page.screenshot(path=Path(folder) / f"web-{scheme}-{viewport['width']}.png", full_page=True)
    for summary in first.locator("summary").all():
        summary.click()
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is wider than the screen
    background = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(background[0]) < 100) == (scheme == "dark")


def test_words_are_tinted_by_their_probability(open_page: Any, edge: Edge) -> None:
    page = open_page()
    first = captioned(page, CAT)
    rows = first.locator("tbody tr").all()
    first.locator(".words summary").click()
    probabilities = [float(row.locator("td").inner_text().removesuffix("%")) / 100 for row in rows]
    words = first.locator(".caption").first.locator(".word")
    doubts = [float(d) for d in words.evaluate_all("all => all.map(w => w.style.getPropertyValue('--doubt'))")]
    assert len(doubts) == len(probabilities) > 3
    # The likelier, the less doubt; of words that show the same percentage either may be the likelier.
    assert sorted(doubts) == [
        d for _, d in sorted(zip(probabilities, doubts, strict=True), key=lambda pair: (-pair[0], pair[1]))
    ]
    colours = words.evaluate_all("all => all.map(w => getComputedStyle(w).backgroundColor)")
    assert len(set(colours)) > 1


def test_several_photos_of_which_one_is_none(open_page: Any, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.jpg"
    (tmp_path / name).write_bytes(b"not a photo at all")
    page = open_page(PHONE)
    page.set_input_files("#files", [CAT, tmp_path / name, COFFEE])
    bad = photo(page, 2)
    expect(bad.locator(".failed-title")).to_have_text("This file cannot be read as a photo")
    assert "JPEG, PNG" in bad.locator(".failed-text").inner_text()
    assert bad.locator(".name").inner_text() == name
    expect(photo(page, 1).locator(".done")).to_be_visible()
    expect(photo(page, 3).locator(".done")).to_be_visible()
    expect(page.locator("#results-title")).to_have_text("Your 3 photos")
    assert not serious(page)
    page.click("#clear")
    expect(page.locator("#results")).to_be_hidden()


def test_with_the_keyboard_alone(open_page: Any) -> None:
    page = open_page()

    def press_until_focus_is(selector: str, key: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", selector  # focus can be seen
                return
        raise AssertionError(f"{selector} is not reached with {key}")

    press_until_focus_is("#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([CAT, COFFEE])
    expect(photo(page, 2).locator(".done")).to_be_visible()
    expect(photo(page, 1).locator(".done")).to_be_visible()
    press_until_focus_is("#num_captions")
    page.keyboard.press("ArrowLeft")
    expect(photo(page).locator(".caption")).to_have_count(2)
    press_until_focus_is("#photos .copy")
    page.keyboard.press("Enter")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.lower().removesuffix(".") == photo(page).locator(".sentence").first.inner_text().lower()
    assert copied[0].isupper()
    press_until_focus_is("#photos summary")
    page.keyboard.press("Enter")
    assert photo(page).locator("details[open]").count() == 1
    press_until_focus_is("#photos .remove")
    page.keyboard.press("Enter")
    expect(page.locator("#photos > li")).to_have_count(1)
    assert page.evaluate("document.activeElement.className") == "remove"  # of the next photo: the place is not lost


def test_screen_readers_hear_the_caption(open_page: Any) -> None:
    page = open_page()
    first = captioned(page, CAT)
    caption = first.locator(".sentence").first.inner_text().lower()
    expect(page.locator("#status")).to_contain_text(caption, ignore_case=True)
    expect(page.locator("#status")).to_contain_text("% sure")
    assert page.locator("#status").get_attribute("role") == "status"


def test_drop_and_paste(open_page: Any) -> None:
    page = open_page()
    make = """([name, text]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, {type: "image/jpeg"}));
        return data;
    }"""
    data = page.evaluate_handle(make, ["dropped.jpg", base64.b64encode(CAT.read_bytes()).decode()])
    page.dispatch_event(".drop", "dragenter", {"dataTransfer": data})
    assert "dragging" in (page.locator("body").get_attribute("class") or "")
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})
    expect(photo(page).locator(".done")).to_be_visible()
    assert "dragging" not in (page.locator("body").get_attribute("class") or "")
    data = page.evaluate_handle(make, ["pasted.jpg", base64.b64encode(COFFEE.read_bytes()).decode()])
    page.evaluate("data => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}))", data)
    expect(photo(page, 2).locator(".done")).to_be_visible()
    assert photo(page).locator(".name").inner_text() == "pasted.jpg"


def test_a_sample_and_a_photo_from_the_camera(open_page: Any) -> None:
    page = open_page()
    page.click("[data-sample='rocket.jpg']")
    expect(photo(page).locator(".done")).to_be_visible()
    page.click("#photograph")
    expect(page.locator("#camera")).to_be_visible()
    page.evaluate("new Promise(done => document.getElementById('video').addEventListener('timeupdate', () => done(1)))")
    assert not serious(page)
    page.click("#shoot")
    expect(page.locator("#camera")).to_be_hidden()
    expect(photo(page, 2).locator(".done")).to_be_visible()
    assert photo(page).locator(".name").inner_text() == "photo.jpg"
    assert page.evaluate("document.getElementById('video').srcObject") is None  # the camera is off again


def test_beam_size_and_number_of_captions_are_asked_for(open_page: Any, edge: Edge) -> None:
    page = open_page()
    captioned(page, CAT)
    page.locator("#num_captions").fill("5")
    expect(photo(page).locator(".caption")).to_have_count(5)
    page.locator("#beam_size").fill("2")
    expect(photo(page).locator(".caption")).to_have_count(2)
    assert page.locator("#num_captions-value").inner_text() == "2"  # never more than beams
    with CAT.open("rb") as file:
        answer = requests.post(f"{edge.url}/predict?beam_size=2", files={"image": file}, timeout=60).json()
    shown = [text.lower() for text in photo(page).locator(".sentence").all_inner_texts()]
    assert shown == [caption["caption"] for caption in answer["captions"]]


def test_the_curl_command_gives_the_same_captions(open_page: Any, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        missing("curl is missing, whose command the page shows")
    awkward = tmp_path / 'it\'s "my" cat, $HOME;.jpg'
    shutil.copy(CAT, awkward)
    page = open_page()
    first = captioned(page, awkward)
    first.locator(".curl summary").click()
    command = first.locator("code").inner_text()
    first.locator(".copy-curl").click()
    expect(first.locator(".copy-curl")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == command
    done = subprocess.run(["bash", "-c", f"{command} -sS"], cwd=tmp_path, capture_output=True, text=True, check=True)
    captions = [caption["caption"] for caption in json.loads(done.stdout)["captions"]]
    assert [text.lower() for text in first.locator(".sentence").all_inner_texts()] == captions
    assert shlex.split(command)[0] == "curl"


def test_a_busy_service_is_asked_again_and_a_lost_one_said(open_page: Any) -> None:
    page = open_page()
    busy = {"error": {"code": "TooManyRequests", "message": "too many"}}
    asked = []

    def refuse_once(route: Any) -> None:
        asked.append(route)
        if len(asked) == 1:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json=busy)
        else:
            route.fallback()

    page.route("**/predict", refuse_once)
    captioned(page, CAT)
    assert len(asked) == 2
    page.unroute("**/predict")
    page.route("**/predict", lambda route: route.abort())
    page.set_input_files("#files", COFFEE)
    expect(photo(page).locator(".failed-text")).to_have_text("There is no connection to the service.")
    page.unroute("**/predict")
    photo(page).locator(".retry").click()
    expect(photo(page).locator(".done")).to_be_visible()


def test_the_documentation_is_shown_from_here(open_page: Any) -> None:
    page = open_page(path="/docs")
    expect(page.locator(".opblock")).to_have_count(6)
    page.locator(".opblock", has_text="/predict").first.click()
    page.click("text=Try it out")
    expect(page.locator("input[type=file]").first).to_be_visible()
