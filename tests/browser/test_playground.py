"""The playground in a real browser: what people do with it, and what goes wrong."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from deployments.model_worker import ModelWorker
from models import Usage
from models.demo import DEMO_CHECKPOINT, simple_scene
from models.engine.messages import GenerationDelta
from models.errors import EngineFault
from tests.browser.conftest import PHONE
from tests.browser.serving import Gate, pause, port_of_its_own, serving, worker_of
from tests.unit.deployments.harness import FakeEngine, engine_of, make_worker

if TYPE_CHECKING:
    from playwright.sync_api import Page

Visit = Callable[..., "Page"]

DONE = "#send:not([hidden])"
ANSWER = ".turn:last-child .answer-text"
FIGURES = ".turn:last-child .figures"
NOTICE = ".turn:last-child .notice .what"
DROP = """([files, kind]) => {
    const data = new DataTransfer();
    for (const [name, type, text] of files) {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        data.items.add(new File([bytes], name, { type }));
    }
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def demo(browser: Any) -> Iterator[str]:
    """The address of the demo model, really there."""
    from models import load_engine

    engine = load_engine(DEMO_CHECKPOINT)
    with serving(worker_of(engine)) as address:
        yield address
    engine.close()


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def give(page: Page, files: dict[str, bytes], kind: str = "drop") -> None:
    """Files by a drop or a paste, as other programs hand them over."""
    types = {"png": "image/png", "jpg": "image/jpeg", "txt": "text/plain"}
    listed = [
        [name, types[name.rsplit(".", 1)[-1]], base64.b64encode(content).decode()]
        for name, content in files.items()
    ]
    page.evaluate(DROP, [listed, kind])


def choose(page: Page, files: dict[str, bytes]) -> None:
    """Files by the dialog of the button."""
    page.set_input_files(
        "#files",
        [
            {"name": name, "mimeType": "image/png", "buffer": content}
            for name, content in files.items()
        ],
    )


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answer(page: Page) -> str:
    """The last one, when it has ended."""
    page.wait_for_selector(DONE)
    return page.locator(ANSWER).text_content() or ""


def prompt(worker: ModelWorker) -> str:
    """What the engine was asked last."""
    return engine_of(worker).asked[-1][0]


# ---- people's ways -------------------------------------------------------------------------------


def test_a_dropped_picture_is_seen_and_the_conversation_goes_on(visit: Visit, demo: str) -> None:
    page = visit(demo)
    star = {"shape.png": encoded(simple_scene("green", "star"))}
    give(page, star, "dragenter")
    assert page.locator("#drop").is_visible()
    give(page, star)
    page.wait_for_selector("#tray li")
    assert page.locator("#drop").is_hidden()
    ask(page, "What is in this picture?")
    assert answer(page) == "The image shows a green star."
    ask(page, "What colour is it?")
    assert answer(page) == "It is green."
    figures = page.locator(FIGURES).inner_text()
    assert "First token" in figures
    assert "cached" in figures, "the second turn finds the first in the cache"
    assert page.locator(".asked img").count() == 1


@pytest.mark.parametrize(
    ("index", "truth"),
    enumerate((
        "It is on the right.",
        "The image shows a green square, a purple cross and an orange triangle.",
        "The number is 42.",
        "It is a square.",
    )),
)  # fmt: skip
def test_the_examples_get_true_answers(visit: Visit, demo: str, index: int, truth: str) -> None:
    page = visit(demo)
    page.click(f".example >> nth={index}")
    page.wait_for_selector("#tray li")
    page.press("#question", "Enter")
    assert answer(page) == truth


def test_the_keyboard_suffices(visit: Visit, demo: str) -> None:
    page = visit(demo)
    assert page.evaluate("document.activeElement.id") == "question"
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message"
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")  # back from the message: the last example
    assert page.evaluate("document.activeElement.className") == "example"
    page.keyboard.press("Enter")
    page.wait_for_selector("#tray li")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # removes the picture
    assert page.locator("#tray li").count() == 0
    page.keyboard.press("Tab")
    page.evaluate("document.getElementById('question').focus()")
    page.keyboard.press("Control+A")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    assert "Send me a picture" in answer(page)
    assert page.evaluate("document.activeElement.id") == "question"
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.locator("#settings").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_two_pictures_arrive_in_their_order_and_the_third_is_removed(visit: Visit) -> None:
    worker = make_worker()
    with serving(worker) as address:
        page = visit(address)
        choose(page, {"wide.png": encoded(Image.new("RGB", (40, 20), "red"))})
        page.wait_for_selector("#tray li")
        give(page, {
            "out.png": encoded(Image.new("RGB", (9, 9), "blue")),
            "tall.png": encoded(Image.new("RGB", (20, 40), "green")),
        }, "paste")  # fmt: skip
        page.wait_for_selector("#tray li >> nth=2")
        page.click("[aria-label='Remove out.png']")
        ask(page, "Compare them.")
        assert answer(page) == "A red circle."
    assert [picture.size for picture in engine_of(worker).asked[-1][1]] == [(40, 20), (20, 40)]
    assert prompt(worker).count("<image>") == 2


def test_an_answer_grows_is_stopped_and_is_built_on(visit: Visit) -> None:
    gate = Gate()
    worker = make_worker(FakeEngine(["A ", "red ", gate, "circle."]))
    with serving(worker) as address:
        page = visit(address)
        ask(page, "What is it?")
        page.wait_for_selector("text=A red")
        assert page.locator(ANSWER).get_attribute("aria-busy") == "true"
        page.fill("#question", "Next")
        page.press("#question", "Enter")  # not while an answer comes
        assert page.locator(".turn").count() == 1
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Stopped.")
        assert answer(page) == "A red "
        assert page.input_value("#question") == "Next"
        for _ in range(500):
            if not engine_of(worker).running:
                break
            page.wait_for_timeout(10)
        assert engine_of(worker).running == 0
        gate.open()
        page.press("#question", "Enter")
        assert answer(page) == "A red circle."
    assert "What is it? ASSISTANT: A red" in prompt(worker)


def test_screen_readers_hear_the_beginning_and_the_end_alone(visit: Visit) -> None:
    words = [step for word in range(40) for step in (f"word{word} ", pause(0.005))]
    with serving(make_worker(FakeEngine(words))) as address:
        page = visit(address)
        page.evaluate("""() => {
            window.heard = [];
            new MutationObserver(() => window.heard.push(document.getElementById("polite").textContent))
                .observe(document.getElementById("polite"), { childList: true });
        }""")  # noqa: E501
        ask(page, "Speak.")
        text = answer(page)
        assert page.evaluate("window.heard") == ["Sent.", text]
        live = "[aria-live], [role=log], [role=status], [role=alert]"
        assert page.locator(f".turn :is({live})").count() == 0


def test_asking_again_and_beginning_anew(visit: Visit) -> None:
    worker = make_worker()
    with serving(worker) as address:
        page = visit(address)
        ask(page, "One?")
        answer(page)
        page.click("text=Ask again")
        answer(page)
        first, second = (asked[0] for asked in engine_of(worker).asked)
        assert first == second
        page.click("#new")
        assert page.locator(".turn").count() == 0
        assert page.locator("#welcome").is_visible()
        ask(page, "Two?")
        answer(page)
    assert "One?" not in prompt(worker)


def test_settings_reach_the_model_and_are_remembered(visit: Visit) -> None:
    worker = make_worker()
    with serving(worker) as address:
        page = visit(address)
        page.click("#open-settings")
        page.fill("#system", "Be brief.")
        page.fill("#temperature", "1.2")
        page.fill("#top_p", "0.5")
        page.fill("#max_tokens", "33")
        page.fill("#seed", "7")
        page.click("[aria-label='Close settings']")
        page.reload()
        ask(page, "Well?")
        answer(page)
        params = engine_of(worker).asked[-1][2]
        assert (params.temperature, params.top_p, params.max_new_tokens, params.seed) == (
            1.2, 0.5, 33, 7,
        )  # fmt: skip
        assert prompt(worker).startswith("Be brief.")
        assert page.get_attribute("#open-settings", "aria-label") == "Settings (changed)"
        page.click("#open-settings")
        page.click("#reset")
        page.keyboard.press("Escape")
        ask(page, "And now?")
        answer(page)
    assert engine_of(worker).asked[-1][2].temperature == 0.2


def test_what_is_copied_asks_the_same(visit: Visit) -> None:
    worker = make_worker()
    hostile = "It's \"quoted\" $HOME `id` \\ 'REQUEST'\nREQUEST\nü 星"
    with serving(worker) as address:
        page = visit(address, permissions=["clipboard-read", "clipboard-write"])
        give(page, {"a.png": encoded(Image.new("RGB", (30, 20), "red"))})
        page.wait_for_selector("#tray li")
        ask(page, hostile)
        text = answer(page)
        original = prompt(worker)
        assert copied(page, "Copy") == text
        if shutil.which("curl"):
            curl = ["bash", "-c", copied(page, "curl")]
            replied = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
            assert "circle." in replied
            assert prompt(worker) == original
            assert len(engine_of(worker).asked[-1][1]) == 1
        program = copied(page, "Python")
    asked = run_with_a_fake_client(program)
    assert asked["base_url"] == f"{address}v1"
    *pictures, words = asked["messages"][0]["content"]
    assert words == {"type": "text", "text": hostile}
    assert pictures[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (asked["temperature"], asked["top_p"], asked["stream"]) == (0.2, 0.7, True)


def copied(page: Page, button: str) -> str:
    page.click(f".turn:last-child .answer-tools >> text='{button}'")
    page.wait_for_selector("text=Copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


def run_with_a_fake_client(program: str) -> dict[str, Any]:
    """Runs it where `openai` is a stand-in that only notes what it was told."""
    noted: dict[str, Any] = {}

    class OpenAI:
        def __init__(self, **options: Any) -> None:
            noted.update(options)
            self.chat = types.SimpleNamespace(completions=self)

        def create(self, **options: Any) -> list[Any]:
            noted.update(options)
            return []

    module = types.ModuleType("openai")
    module.__dict__["OpenAI"] = OpenAI
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openai", module)
        exec(compile(program, "copied", "exec"), {})
    return noted


# ---- what is shown -------------------------------------------------------------------------------


def test_what_a_model_says_is_text(visit: Visit) -> None:
    said = "<img src=x onerror=alert(1)><b>bold</b>\n<script>1</script> &amp;"
    with serving(make_worker(FakeEngine([said]))) as address:
        page = visit(address)
        ask(page, "<i>Hello</i>")
        assert answer(page) == said
        assert page.locator(".turn :is(img, b, i, script)").count() == 0


def test_the_figures_are_the_servers(visit: Visit) -> None:
    usage = Usage(prompt_tokens=1234, completion_tokens=2, cached_tokens=1200)
    last = GenerationDelta("r", text="there", finish_reason="length", usage=usage)
    with serving(make_worker(FakeEngine(["Hello ", pause(0.25), last]))) as address:
        page = visit(address)
        ask(page, "Hi")
        answer(page)
        figures = page.locator(FIGURES).inner_text()
        assert "2 tokens" in figures
        assert "1,234, 1,200 cached" in figures
        speed = int(figures.split(" tokens/s")[0].split()[-1])
        assert 2 <= speed <= 6, "one token after 0.25 s"
        assert page.locator("text=Cut off at 512 tokens").is_visible()


def test_a_phone_needs_no_sideways_scrolling(visit: Visit) -> None:
    long = "a" * 300
    with serving(
        make_worker(FakeEngine([f"https://example.com/{long} ", "and words " * 60]))
    ) as at:
        page = visit(at, **PHONE)
        widths = [page.evaluate("document.scrollingElement.scrollWidth")]
        give(page, {f"{long[:200]}.png": encoded(Image.new("RGB", (900, 90), "red"))})
        page.wait_for_selector("#tray li")
        page.fill("#question", long)
        page.tap("#send")
        answer(page)
        give(page, {"notes.txt": b"x"})
        page.wait_for_selector("#refusals li")
        widths.append(page.evaluate("document.scrollingElement.scrollWidth"))
        page.tap("#open-settings")
        widths.append(page.evaluate("document.getElementById('settings').scrollWidth"))
        page.tap("[aria-label='Close settings']")
        too_small = page.evaluate("""[...document.querySelectorAll("button")].filter((button) => {
            const { width, height } = button.getBoundingClientRect();
            return width && Math.min(width, height) < 24;
        }).length""")
    assert max(widths) <= 360
    assert too_small == 0


def test_a_phone_shows_all_examples_at_once_and_speaks_of_no_mouse(visit: Visit) -> None:
    with serving(make_worker()) as address:
        page = visit(address, **PHONE)
        last, composer = page.locator(".example >> nth=3"), page.locator("#composer")
        assert (
            last.bounding_box()["y"] + last.bounding_box()["height"] < composer.bounding_box()["y"]
        )
        assert page.inner_text(".welcome > p").startswith("Choose or take pictures, and ask")
        page.tap("#open-settings")
        assert page.locator("#settings").get_by_text("Ctrl").is_hidden()


def test_the_theme_is_the_systems_until_another_is_chosen(visit: Visit) -> None:
    with serving(make_worker()) as address:
        page = visit(address, color_scheme="dark")
        background = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(background)
        page.click("[aria-label='Light theme']")
        light = page.evaluate(background)
        assert (dark, light) == ("rgb(20, 22, 21)", "rgb(252, 252, 251)")
        page.reload()
        assert page.evaluate(background) == light
        page.click("[aria-label='Dark theme']")
        page.reload()
        page.emulate_media(color_scheme="light")
        assert page.evaluate(background) == light, "back at the system's, which is followed again"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(visit: Visit, scheme: str) -> None:
    with serving(make_worker(FakeEngine(["Hello. ", EngineFault("out of memory")]))) as address:
        page = visit(address, color_scheme=scheme, reduced_motion="reduce")
        ask(page, "Hi")
        page.wait_for_selector(NOTICE)
        choose(page, {"broken.png": b"no"})
        page.wait_for_selector("#refusals li")
        unnamed = page.evaluate("""[...document.querySelectorAll("button, input, textarea, img, dialog")]
            .filter((one) => !(one.getAttribute("aria-label") || one.alt || one.labels?.length
                || one.textContent.trim() || one.type === "file" || one.id === "viewer-picture"))
            .map((one) => one.outerHTML)""")  # noqa: E501
        faint = page.evaluate(FAINT_TEXT)
    assert unnamed == []
    assert faint == []


FAINT_TEXT = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (one) => {
        for (; one; one = one.parentElement) {
            const colour = numbers(getComputedStyle(one).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
    };
    return [...document.querySelectorAll("body *")].filter((one) =>
        one.checkVisibility() && !one.disabled
        && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .map((one) => [one.textContent.trim().slice(0, 30),
            [numbers(getComputedStyle(one).color), behind(one)].map(light).sort((a, b) => a - b)])
        .filter(([, [low, high]]) => (high + 0.05) / (low + 0.05) < 4.5)
        .map(([text]) => text);
}"""


def test_large_pictures_are_made_smaller_and_stay_upright(visit: Visit) -> None:
    picture = Image.new("RGB", (3000, 1500), "white")
    picture.paste((255, 0, 0), (0, 0, 3000, 300))  # lies on its side: the right edge, once upright
    exif = Image.Exif()
    exif[274] = 6
    worker = make_worker()
    with serving(worker) as address:
        page = visit(address)
        give(page, {"photo.jpg": encoded(picture, "JPEG", exif=exif)})
        page.wait_for_selector("#tray li")
        ask(page, "What?")
        answer(page)
    (seen,) = engine_of(worker).asked[-1][1]
    assert seen.size == (1024, 2048)
    assert seen.getpixel((1000, 1000))[1] < 60 < 200 < seen.getpixel((20, 1000))[1]


# ---- what goes wrong -----------------------------------------------------------------------------


def test_files_that_are_no_pictures_are_named(visit: Visit) -> None:
    with serving(make_worker()) as address:
        page = visit(address)
        good = encoded(Image.new("RGB", (9, 9), "blue"))
        give(page, {"notes.txt": b"hello", "cut.png": good[:20], "good.png": good})
        page.wait_for_selector("#tray li")
        told = page.locator("#refusals li").all_inner_texts()
        assert [text.split()[0] for text in told] == ["notes.txt", "cut.png"]
        assert page.locator("#tray li").count() == 1
        ask(page, "And this?")
        answer(page)
        assert page.locator("#refusals li").count() == 0


def test_a_picture_that_the_server_refuses_is_named_and_can_be_taken_out(visit: Visit) -> None:
    worker = make_worker(max_image_side=64)
    with serving(worker) as address:
        page = visit(address)
        choose(page, {"small.png": encoded(Image.new("RGB", (9, 9), "blue"))})
        page.wait_for_selector("#tray li")
        ask(page, "First?")
        answer(page)
        choose(page, {
            "fine.png": encoded(Image.new("RGB", (9, 9), "blue")),
            "large.png": encoded(Image.new("RGB", (100, 9), "blue")),
        })  # fmt: skip
        page.wait_for_selector("#tray li >> nth=1")
        ask(page, "Second?")
        page.wait_for_selector(NOTICE)
        assert page.locator(NOTICE).inner_text().startswith("large.png is 100 x 9 pixels")
        page.click("text=Edit the message")
        assert page.input_value("#question") == "Second?"
        page.click("[aria-label='Remove large.png']")
        page.press("#question", "Enter")
        assert answer(page) == "A red circle."
    assert len(engine_of(worker).asked[-1][1]) == 2


def test_too_much_for_the_server_is_said(visit: Visit) -> None:
    with serving(make_worker(max_body_bytes=2000)) as address:
        page = visit(address)
        ask(page, "word " * 1000)
        page.wait_for_selector(NOTICE)
        assert "too much for the server" in page.locator(NOTICE).inner_text()


def test_a_full_server_is_waited_for(visit: Visit) -> None:
    worker = make_worker(max_num_seqs=1, max_waiting=0)
    with serving(worker) as address:
        page = visit(address)
        with worker.door.enter():
            ask(page, "Is there room?")
            page.wait_for_selector("text=The server is busy. Trying again in 1 s.")
        assert answer(page) == "A red circle."


def test_waiting_for_a_full_server_can_be_stopped(visit: Visit) -> None:
    worker = make_worker(max_num_seqs=1, max_waiting=0)
    with serving(worker) as address, worker.door.enter():
        page = visit(address)
        ask(page, "Is there room?")
        page.wait_for_selector("text=The server is busy.")
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Stopped.")
    assert engine_of(worker).asked == []


def test_a_draining_server_says_so(visit: Visit) -> None:
    worker = make_worker()
    with serving(worker) as address:
        page = visit(address)
        worker.drain()
        ask(page, "Still there?")
        page.wait_for_selector(NOTICE)
        assert "shutting down" in page.locator(NOTICE).inner_text()
        page.wait_for_selector("#link[data-state=draining]")


def test_a_server_that_fails_midway_leaves_what_it_said(visit: Visit) -> None:
    with serving(make_worker(FakeEngine(["A red ", EngineFault("out of memory")]))) as address:
        page = visit(address)
        ask(page, "What is it?")
        page.wait_for_selector(NOTICE)
        assert page.locator(ANSWER).text_content() == "A red "
        assert "Out of memory" in page.locator(NOTICE).inner_text()


def test_a_server_that_goes_and_comes_back(visit: Visit) -> None:
    port = port_of_its_own()
    with serving(make_worker(FakeEngine(["A red ", Gate()])), port) as address:
        page = visit(address)
        ask(page, "What is it?")
        page.wait_for_selector("text=A red")
    page.wait_for_selector(NOTICE)
    assert "connection broke" in page.locator(NOTICE).inner_text()
    page.click("text=Try again")
    page.wait_for_selector(f"{NOTICE} >> text=cannot be reached")
    page.wait_for_selector("#link[data-state=gone]")
    with serving(make_worker(), port):
        page.wait_for_selector(f"{NOTICE} >> text=The server is back. Your message can")
        assert page.locator("#link").inner_text() == "Ready"
        page.click("text=Try again")
        assert answer(page) == "A red circle."


def test_nothing_is_loaded_from_elsewhere(visit: Visit) -> None:
    with serving(make_worker()) as address:
        page = visit(address)
        loaded: list[str] = []
        page.on("request", lambda request: loaded.append(request.url))
        page.reload()
        page.wait_for_selector("#link[data-state=ok]", state="attached")
        page.wait_for_load_state("networkidle")
    assert len(loaded) > 10
    assert all(url.startswith((address, "data:", "blob:")) for url in loaded)


def test_the_modules_have_no_way_to_make_html() -> None:
    static = Path(__file__).parents[2] / "deployments" / "playground" / "static"
    for module in static.glob("*.js"):
        source = module.read_text()
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in source, f"{module.name} has {way}"
    page = (static / "index.html").read_text()
    assert "style=" not in page
    assert json.dumps("javascript:") not in page
