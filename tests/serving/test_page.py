"""The page in headless Chromium, as a user types into it, with a model whose text is known. Run by make test-browser."""

import json
import threading

import pytest
from browser import ALT, CONTROL, SHIFT, Page, browser
from http_server import Running, running, served, tells, until

from kindling.serving import openai
from kindling.serving.scheduler import Busy

pytestmark = pytest.mark.browser
CONTROLS = ("button", "slider", "spinbutton", "textbox", "tab")
HOSTILE = '<img src=x onerror="document.title=1"><script>0</script>'


def writes(prompt: str) -> str:
    """Write HTML where there is danger, and nothing where silence is asked for; otherwise as `tells`."""
    if prompt.endswith("silence\nAssistant:"):
        return ""
    if "danger" not in prompt:
        return tells(prompt)
    n = next(n for n in range(len(HOSTILE), -1, -1) if prompt.endswith(HOSTILE[:n]))
    return HOSTILE[n : n + 1]


@pytest.fixture(scope="module")
def server():
    with running(served(writes, block_size=512, template="user-assistant")) as one:
        yield one


@pytest.fixture(scope="module")
def chromium():
    with browser() as one:
        yield one


@pytest.fixture
def page(chromium, server):
    """The page, just opened at the editor; at the end, it has complained of nothing and asked no other host."""
    opened(chromium, server)
    yield chromium
    assert chromium.complaints == []
    assert {url.removeprefix(server.url) for url, _ in chromium.requests} <= {
        "/",
        "/about.json",
        "/v1/completions",
        "/v1/chat/completions",
    }


def opened(page: Page, server: Running) -> None:
    page.size(1200)
    page.prefer("light")
    page.open(server.url + "/")
    page.run("localStorage.clear(); sessionStorage.clear()")
    page.run("show('editor')")
    page.requests.clear()
    page.complaints.clear()


def asked(page: Page) -> list[dict]:
    """Return the bodies of the requests so far."""
    page.run("1")  # so that all earlier events have been read
    return [json.loads(body) for _, body in page.requests if body]


def write(page: Page, text: str, after: str = "") -> None:
    """Put text around the cursor as if it had been typed, and wait for what the model says there."""
    page.run(f"$('text').value = {json.dumps(text + after)}; $('text').setSelectionRange({len(text)}, {len(text)})")
    page.run("$('text').dispatchEvent(new Event('input'))")
    shown(page)


def shown(page: Page) -> str:
    """Return the ghost text, once all of it is there."""
    return str(page.until("$('status').textContent.includes('tokens/s') && rest()"))


def value(page: Page) -> object:
    return page.run("$('text').value")


def test_it_says_what_the_model_is(page):
    assert page.text("h1") == "fake" and page.run("document.title") == "fake · Kindling"
    assert "1,234,567 parameters in int8, context of 512 tokens" in page.text("#facts")
    assert "fills in the middle, chats" in page.text("#facts")


def test_tab_accepts_the_ghost_text_and_undo_takes_it_back(page):
    write(page, "x = 5")
    assert shown(page) == "6789" and value(page) == "x = 5"
    assert page.text("#mirror").startswith("x = 56789")
    page.press("Tab")
    assert value(page) == "x = 56789" and page.run("rest()") == ""
    page.run("document.execCommand('undo')")
    assert value(page) == "x = 5"


def test_escape_dismisses_and_control_right_takes_a_word(page):
    write(page, "if danger:\n  ")
    assert shown(page) == HOSTILE
    page.press("ArrowRight", CONTROL)
    page.press("ArrowRight", ALT)
    assert value(page) == "if danger:\n  <img" and page.run("rest()") == HOSTILE[4:]
    page.press("Escape")
    assert page.run("rest()") == "" and page.text("#mirror") == "if danger:\n  <img\u200b"


def test_ghost_text_that_is_typed_stays_without_another_request(page):
    write(page, "x = 5")
    n = len(asked(page))
    page.type("6")
    page.type("7")
    assert page.run("rest()") == "89" and len(asked(page)) == n
    page.type("x")
    assert page.run("rest()") == ""
    page.until("rest() === '0123456789'")
    assert len(asked(page)) == n + 1


def test_the_text_after_the_cursor_is_read(page):
    write(page, "def f():\n    if x:", "\n    return 1\n")
    assert shown(page) == "pass" and asked(page)[-1]["suffix"] == "\n    return 1\n"
    assert page.text("#mirror") == "def f():\n    if x:pass\n    return 1\n\u200b"


def test_tab_indents_a_line_and_leaves_after_escape(page):
    page.run("$('text').value = 'a:'")
    page.press("Enter")
    assert value(page) == "a:\n    "
    page.press("Tab")
    assert value(page) == "a:\n        "
    page.press("Escape")
    page.press("Tab")
    assert page.run("document.activeElement.id") == "complete"
    page.press("Tab", SHIFT)
    assert page.run("document.activeElement.id") == "text"


def test_rivals_are_shown_by_keyboard_and_on_hover(page, server, monkeypatch):
    monkeypatch.setattr(server.served.scheduler._batch._engine, "sure", 10.0)  # so that rivals have a share
    write(page, "x = 5")
    shown(page)
    page.press("ArrowDown", ALT)
    page.press("ArrowRight")
    assert page.text("#strip [aria-current=true]") == "7"
    assert page.text("#rivals .chosen") == "799.4%" and page.run("$('rivals').children.length") == 8
    page.point("#strip button:nth-child(4)")
    assert page.text("#rivals .chosen").startswith("9")
    page.point("#mirror .ghost:nth-last-of-type(2)")
    assert page.text("#rivals .chosen").startswith("8")
    page.press("Escape")
    assert page.run("document.activeElement.id") == "text" and shown(page) == "6789"


def test_a_rival_can_be_taken_instead(page):
    write(page, "x = 5")
    page.point("#strip button:nth-child(2)")
    page.run("[...$('rivals').querySelectorAll('button')].at(-1).click()")
    other = page.run("$('text').value.slice(5)")
    assert other[0] == "6" and other != "67" and page.run("document.activeElement.id") == "text"


def test_a_clicked_token_is_held_while_the_mouse_goes_to_its_rivals(page):
    write(page, "x = 5")
    page.point("#strip button:nth-child(2)", click=True)
    page.point("#strip button:nth-child(3)")
    assert page.text("#rivals .chosen").startswith("7")
    page.point("#rivals li:nth-child(3) button")
    page.point("h1")
    page.point("#strip button:nth-child(3)")
    assert page.text("#rivals .chosen").startswith("8")


def test_only_what_is_near_the_cursor_is_sent(page):
    write(page, ("x" * 59 + "\n") * 2000 + "if x:", ("y" * 59 + "\n") * 2000)
    body = asked(page)[-1]
    assert len(body["prompt"]) == len(body["suffix"]) == 100_000 and body["prompt"].endswith("x:")


def test_a_slider_changes_the_next_request(page):
    write(page, "x = 5")
    assert asked(page)[-1]["temperature"] == 0 and "seed" not in asked(page)[-1]
    page.run("$('temperature').focus()")
    page.press("ArrowRight")
    assert page.text("label:has(#temperature) output") == "0.05"
    page.run("$('seed').focus()")
    page.type("7")
    until(lambda: asked(page)[-1].get("seed") == 7)
    assert asked(page)[-1]["temperature"] == 0.05
    page.point("#reset", click=True)
    until(lambda: asked(page)[-1]["temperature"] == 0)


def test_what_the_model_writes_stays_text(page):
    write(page, "danger ")
    assert shown(page) == HOSTILE
    page.press("Tab")
    page.run("show('chat')")
    page.type(f"danger {HOSTILE}")
    page.press("Enter")
    page.until("messages.length === 2")
    assert page.text("#log li:nth-child(2) .said") == HOSTILE
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    assert page.run("document.title") == "fake · Kindling"


def test_a_chat_streams_stops_and_begins_anew(page, server):
    page.run("show('chat')")
    page.type("one")
    page.press("Enter", SHIFT)
    page.type("two")
    page.press("Enter")
    page.until("messages.length === 2")
    assert page.text("#log .mine .said") == "one\ntwo" and page.text("#log li:nth-child(2) .said") == "0123456789"
    assert page.run("$('strip').children.length") == 10
    page.type("again")
    page.press("Enter")
    page.until("messages.length === 4")
    page.run("about.remembers = true")
    page.type("and again")
    with held(server, after=4):
        page.press("Enter")
        page.until("$('log').lastChild.textContent.length > 4")
        page.press("Escape")
        page.until("$('status').textContent === 'Stopped.'")
    assert [len(one["messages"]) for one in asked(page) if "messages" in one] == [1, 1, 5]
    page.point("#new-chat", click=True)
    assert page.text("#log") == "" and page.run("messages.length") == 0


def test_a_chat_without_an_answer_is_no_part_of_the_next_question(page):
    page.run("show('chat'); about.remembers = true")
    page.type("silence")
    page.press("Enter")
    page.until("$('log').textContent.includes('(no answer)')")
    page.type("one")
    page.press("Enter")
    page.until("messages.length === 2")
    assert [one["content"] for one in asked(page)[-1]["messages"]] == ["one"]


def test_an_answer_that_streams_on_leaves_the_editor_alone(page, server):
    page.run("show('chat')")
    page.type("one")
    with held(server, after=3):
        page.press("Enter")
        page.until("$('log').lastChild?.textContent.length > 4")
        page.run("show('editor')")
    page.until("messages.length === 2")
    assert page.run("$('strip').children.length") == 0


class held:
    """Hold the model after some passes, until the block is left."""

    def __init__(self, server: Running, after: int):
        self.engine, self.left, self.go_on = server.served.scheduler._batch._engine, after, threading.Event()

    def __enter__(self):
        self.engine.before_pass = self.wait

    def wait(self, texts) -> None:
        self.left -= 1
        if self.left < 0:
            self.go_on.wait(20)

    def __exit__(self, *error):
        self.engine.before_pass = lambda texts: None
        self.go_on.set()


def test_who_types_on_ends_the_request_before(page, server):
    write(page, "x = 5")
    n = server.served.metrics.n_left
    with held(server, after=1):
        page.type("0")
        page.until("asking && rest() === ''")
        until(lambda: len(asked(page)) >= 2)
        page.type("1")
        until(lambda: server.served.metrics.n_left > n)
    page.until("rest() === '23456789'")


def test_a_busy_server_is_asked_once_more_and_then_its_error_is_shown(page, server, monkeypatch):
    submit, refusals = server.served.scheduler.submit, [1]

    def busy(*args):
        if refusals and refusals[0]:
            refusals[0] -= 1
            raise Busy(3.0, "the queue is full")
        return submit(*args)

    monkeypatch.setattr(server.served.scheduler, "submit", busy)
    page.run("sleep = async (ms) => { globalThis.slept = ms; }")
    write(page, "x = 5")
    assert page.run("slept") == 3000 and page.run("$('error').hidden")
    refusals[0] = 2
    page.type("1")
    page.until("!$('error').hidden")
    assert page.text("#error") == "the queue is full; ask again in 3 s" and refusals == [0]
    page.type("2")
    page.until("rest() && $('error').hidden")
    page.run("1")
    page.complaints[:] = [said for said in page.complaints if "503" not in said]  # the browser's own line


def test_an_answer_that_breaks_off_is_an_error_in_one_line(page, server, monkeypatch):
    monkeypatch.setattr(openai, "usage", lambda wholes, n: None)
    page.type("5")
    page.until("!$('error').hidden")
    assert page.text("#error").startswith("The answer broke off") and page.text("#status") == ""


def test_a_dismissed_request_is_no_longer_said_to_be_written(page, server):
    page.until("$('status').textContent.includes('tokens/s')")
    with held(server, after=0):
        page.type("5")
        page.until("$('status').textContent === 'Writing …'")
        page.press("Escape")
        page.until("$('status').textContent === ''")


def test_the_theme_is_the_system_s_until_one_is_chosen(page, server):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.prefer("dark")
    dark = page.run(ground)
    page.point("#theme", click=True)
    assert page.text("#theme") == "Theme: light" and page.run(ground) == light != dark
    page.point("#theme", click=True)
    page.prefer("light")
    page.open(server.url + "/")
    assert page.text("#theme") == "Theme: dark" and page.run(ground) == dark


@pytest.mark.parametrize("which", ["editor", "chat"])
def test_a_narrow_window_scrolls_in_one_direction_only(page, which):
    write(page, "x = " + "5" * 100)
    page.size(320)
    page.run(f"show('{which}')")
    assert page.run("document.documentElement.scrollWidth") == 320


def test_every_control_has_a_name(page):
    write(page, "x = 5")
    for which in ("editor", "chat"):
        page.run(f"show('{which}')")
        nodes = [n for n in page.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
        names = [n["name"]["value"] for n in nodes if n["role"]["value"] in CONTROLS]
        assert len(names) > 10 and all(names)


def test_markup_and_code_that_are_not_the_page_s_own_are_refused(page):
    for script in ("document.body.innerHTML = '<b>'", "document.body.setAttribute('onclick', 'document.title = 1')"):
        assert page.run(f"(() => {{ try {{ {script}; }} catch (error) {{ return error.name; }} }})()") == "TypeError"
    page.run("1")
    assert len(page.complaints) == 2  # of the markup, and of the handler
    page.complaints.clear()


def test_a_server_with_a_key_asks_for_it(chromium):
    with running(served(), api_key="secret") as server:
        chromium.call("Page.navigate", url=server.url + "/")
        chromium.until("document.readyState === 'complete' && !$('key-form').hidden && !$('error').hidden")
        assert "Authorization" in chromium.text("#error")
        chromium.run("$('key').focus()")
        chromium.type("secret")
        chromium.press("Enter")
        chromium.until("about !== null && rest() === '0123456789'")
        assert chromium.run("$('key-form').hidden && $('error').hidden && $('tabs').hidden")


def test_a_long_text_scrolls_with_its_ghost(page):
    write(page, "\n".join(["x"] * 60) + "5")
    heights = page.run("['text', 'mirror'].map((id) => $(id).getBoundingClientRect().height)")
    assert heights[0] == heights[1] > 1000 and page.run("$('pad').scrollTop") > 1000
    page.run("$('pad').scrollTop = 0")
    page.press("Tab")
    assert page.run("$('pad').scrollTop") > 1000
