"""The chat page in headless Chromium, against a server that runs the demo model.

Needs playwright (`pip install 'latentcore[slow]'`) and a Chromium of the system's.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from latentcore.models.hub import DEMO_MODEL
from tests.server.process import ServerProcess, serving

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'latentcore[slow]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium in PATH"),
    pytest.mark.skipif(
        not (DEMO_MODEL / "model.safetensors").is_file(), reason="the demo model is not built"
    ),
]

CHAT = "**/v1/chat/completions"
ABORTED = 'request_success_total{engine="0",finished_reason="abort",model_name="latentcore-demo"}'
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(None, cache=tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chat:
    """One page, what it asked the network for, and what its console said."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(30_000)
        self.asked: list[Any] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(url)
        playwright.expect(self.page.locator("#model")).not_to_be_empty()

    def send(self, text: str) -> None:
        self.page.locator("#input").fill(text)
        self.page.keyboard.press("Enter")

    def finished(self, turns: int = 1) -> Any:
        """The last answer, once the line below it is there."""
        playwright.expect(self.page.locator(".turn.assistant .meta")).to_have_count(turns)
        return self.page.locator(".turn.assistant").last

    def set(self, **values: object) -> None:
        self.page.locator("#settings summary").click()
        for name, value in values.items():
            self.page.locator(f"[name={name}]").fill(str(value))
        self.page.keyboard.press("Escape")

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(one.post_data) for one in self.asked if one.method == "POST"]

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id || document.activeElement.name"))


@pytest.fixture
def chat(browser: Any, demo: ServerProcess) -> Iterator[Chat]:
    """A page that has to leave its console empty and stay with its own server."""
    chat = Chat(browser, demo.url)
    yield chat
    assert not chat.complaints
    assert all(one.url.startswith((demo.url, "data:")) for one in chat.asked)
    chat.page.context.close()


def test_an_answer_streams_and_its_speed_is_shown(chat: Chat) -> None:
    chat.page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
            for (const one of document.querySelectorAll(".turn.assistant .body"))
              window.seen.add(one.textContent);
        }).observe(document.getElementById("log"), {childList: true, subtree: true}); }"""
    )
    chat.send("Tell me a story about a fox.")
    answer = chat.finished()
    assert len(chat.page.evaluate("[...window.seen]")) > 5
    assert re.search(r"\d+ tokens · \d+\.\d tokens/s · first after \d+ ms", answer.inner_text())
    assert chat.page.locator("#empty").is_hidden()
    assert chat.focused() == "input"
    assert chat.page.locator("#model").inner_text() == "latentcore-demo"


def test_reasoning_is_folded(chat: Chat) -> None:
    chat.set(temperature=0)
    chat.page.locator("#thinking").check()
    chat.send("What is 123 + 456?")
    answer = chat.finished()
    assert "579" in answer.locator(".body").inner_text()
    thought = answer.locator(".reasoning > div")
    assert thought.is_hidden()
    summary = answer.locator(".reasoning summary")
    assert re.fullmatch(r"Reasoned for \d+\.\d s", summary.inner_text())
    summary.press("Enter")
    assert thought.is_visible()
    assert "think>" not in answer.inner_text()
    chat.send("And 1 + 1?")
    chat.finished(2)
    assert "reasoning_content" not in str(chat.bodies()[1]["messages"])


def test_a_tool_call_is_shown_and_its_result_goes_back(chat: Chat) -> None:
    chat.set(temperature=0)
    chat.page.locator("#settings summary").click()
    chat.page.locator("#example").click()
    chat.page.keyboard.press("Escape")
    chat.send("What is the weather in Paris?")
    call = chat.finished().locator(".call")
    assert 'get_weather({"city": "Paris"})' in call.inner_text()
    assert chat.focused() == ""  # the field for the result, which has no name
    result = '{"city": "Paris", "temperature": 18, "conditions": "sunny"}'
    chat.page.keyboard.type(result)
    chat.page.keyboard.press("Enter")
    assert "18" in chat.finished(2).inner_text()
    sent = chat.bodies()[1]["messages"]
    assert [one["role"] for one in sent] == ["user", "assistant", "tool"]
    assert sent[2] == {
        "role": "tool",
        "tool_call_id": sent[1]["tool_calls"][0]["id"],
        "content": result,
    }


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping_reaches_the_server(chat: Chat, demo: ServerProcess, how: str) -> None:
    demo.wait_idle()
    ended, aborted = demo.metric("request_success_total"), demo.metric(ABORTED)
    # Thousands of tokens that do not end by themselves: the page knows no such setting.
    chat.page.route(
        CHAT,
        lambda route: route.continue_(
            post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True})
        ),
    )
    chat.send("Tell me a story about a fox.")
    playwright.expect(chat.page.locator(".turn.assistant .body")).not_to_be_empty()
    assert demo.metric("num_requests_running") == 1
    if how == "Escape":
        chat.page.keyboard.press("Escape")
    else:
        chat.page.locator("#stop").click()
    assert chat.finished().locator(".meta").inner_text().startswith("Stopped · about ")
    demo.wait_idle()
    assert demo.metric(ABORTED) == aborted + 1
    assert demo.metric("request_success_total") == ended + 1
    assert chat.focused() == "input"
    chat.page.unroute(CHAT)
    chat.set(max_tokens=5)
    chat.send("Go on.")
    assert "Cut off" in chat.finished(2).inner_text()
    roles = [one["role"] for one in chat.bodies()[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_settings_reach_the_request(chat: Chat) -> None:
    values = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_tokens": 7,
        "seed": 11,
    }
    chat.set(**values, system="Be brief.", key="some-key")
    chat.page.locator("#thinking").check()
    texts = []
    for number in (1, 2):
        chat.send("Hello")
        texts.append(chat.finished().inner_text().split(" tokens")[0])
        assert {name: chat.bodies()[-1][name] for name in values} == values
        assert chat.bodies()[-1]["chat_template_kwargs"] == {"thinking": True}
        assert chat.bodies()[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert chat.asked[-1].headers["authorization"] == "Bearer some-key"
        if number == 1:
            chat.page.locator("#new").click()
    assert "7" in texts[0]


def test_keys(chat: Chat) -> None:
    chat.set(max_tokens=3)
    chat.page.locator("#input").focus()
    chat.page.keyboard.type("one")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("two")
    assert chat.page.locator("#input").input_value() == "one\ntwo"
    assert chat.page.locator(".turn").count() == 0
    chat.page.keyboard.press("Enter")
    chat.finished()
    assert chat.bodies()[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    chat.page.keyboard.press("Control+Shift+K")
    assert chat.page.locator(".turn").count() == 0
    assert chat.page.locator("#empty").is_visible()
    chat.page.keyboard.press("Enter")  # nothing typed: nothing sent
    assert len(chat.bodies()) == 1


def test_the_tab_key_goes_everywhere_and_shows_where(chat: Chat) -> None:
    chat.page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(9):
        chat.page.keyboard.press("Tab")
        seen.append(
            chat.page.evaluate(
                """() => { const one = document.activeElement, style = getComputedStyle(one),
                  around = getComputedStyle(one.closest("form") || one);
                  return [one.id || one.tagName, style.outlineStyle != "none" ||
                    around.boxShadow.includes("0px 0px 0px 1px")]; }"""
            )
        )
    assert seen.pop(0)[0] == "BODY"  # the browser's own controls come first
    names = [name for name, _ in seen]
    assert names == ["thinking", "new", "SUMMARY", "log", "BUTTON", "BUTTON", "BUTTON", "input"]
    assert all(shown for _, shown in seen), seen


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two CSS colours."""

    def luminance(text: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", text)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [320, 360, 1200])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_legible_in_every_width_and_colour(
    browser: Any, demo: ServerProcess, scheme: str, width: int
) -> None:
    chat = Chat(browser, demo.url, color_scheme=scheme, viewport={"width": width, "height": 640})
    chat.set(max_tokens=40)
    chat.send("Tell me a story about " + "x" * 300)
    chat.finished()
    page = chat.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = "e => getComputedStyle(e).color"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(paper, "rgb(255, 255, 255)") < 1.5) == (scheme == "light")
    for name in ("body", ".meta", "#model", ".turn.assistant"):
        assert contrast(page.locator(name).first.evaluate(colour), paper) >= 4.5, name
    page.locator("#settings summary").click()
    for name in ("#send", "#new", "#thinking", "#settings summary", "#settings form"):
        box = page.locator(name).bounding_box()
        assert box is not None, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
        assert box["y"] + box["height"] <= 640, name
    assert not chat.complaints
    page.context.close()


def test_a_busy_server_and_trying_again(browser: Any, demo: ServerProcess) -> None:
    chat = Chat(browser, demo.url)
    refused = {"error": {"message": "64 requests are running and 256 waiting"}}
    chat.page.route(
        CHAT, lambda route: route.fulfill(status=429, headers={"Retry-After": "2"}, json=refused)
    )
    chat.send("What is 17 + 25?")
    fault = chat.page.get_by_role("alert")
    playwright.expect(fault).to_contain_text("The server is busy")
    assert "64 requests are running and 256 waiting (in 2 s or later)" in fault.inner_text()
    chat.page.unroute(CHAT)
    fault.get_by_role("button").click()
    assert "tokens/s" in chat.finished().inner_text()
    assert fault.count() == 0
    assert chat.bodies()[0] == chat.bodies()[1]
    chat.page.context.close()


def test_a_refused_request_says_why(browser: Any, demo: ServerProcess) -> None:
    chat = Chat(browser, demo.url)
    chat.set(max_tokens=99999)
    chat.send("Hello")
    fault = chat.page.get_by_role("alert")
    playwright.expect(fault).to_contain_text("The request was refused")
    assert "max_tokens: the prompt has" in fault.inner_text()
    chat.page.locator("#new").click()
    chat.set(tools="{not json")
    chat.send("Hello")
    assert "not a JSON list" in chat.page.locator("#status").inner_text()
    assert chat.page.locator(".turn").count() == 0
    chat.page.context.close()


def test_a_server_that_went_away_and_one_that_wants_a_key(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with serving(None, key="the-key", cache=tmp_path_factory.mktemp("cache")) as server:
        chat = Chat(browser, server.url)
        assert chat.page.locator("#model").inner_text() == "needs an API key"
        chat.send("Hello")
        playwright.expect(chat.page.get_by_role("alert")).to_contain_text("asks for a key")
        assert chat.focused() == "key"
        chat.page.keyboard.type("the-key")
        chat.page.keyboard.press("Escape")
        playwright.expect(chat.page.locator("#model")).to_have_text("latentcore-demo")
        chat.page.get_by_role("alert").get_by_role("button").click()
        chat.finished()
        chat.send("Tell me a story about a fox. " * 3)
        time.sleep(0.05)
        server.process.kill()
        server.process.wait()
        chat.send("Hello")
        playwright.expect(chat.page.get_by_role("alert").last).to_contain_text("does not answer")
        chat.page.context.close()
