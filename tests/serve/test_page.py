"""The chat page in a headless Chromium, against a server whose model says what the test has it say."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from glm45_jax.infer import Delta
from glm45_jax.serve import App, ServeOptions, bind, run
from tests.serve.support import Scripted, ask, connect
from tests.serve.test_chat import TWO

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


def test_what_comes_with_the_page(app) -> None:
    response = ask(app, "/")
    policy = response.headers["content-security-policy"]
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert response.headers["x-content-type-options"] == "nosniff"
    html = response.text
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(?!data:)\w""", html)  # nothing from elsewhere
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|\son\w+=|style=", html
    )
    assert len(html) < 40_000 and ask(app, "/", {}).status_code == 405


def test_it_needs_no_key_but_what_it_asks_does(engine) -> None:
    locked = App(engine, "small", ServeOptions(api_keys=("right",)))
    assert ask(locked, "/").status_code == 200 and ask(locked, "/v1/models").status_code == 401


# --- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    own = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as started:
        if own is None and not os.path.exists(started.chromium.executable_path):
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        chromium = started.chromium.launch(executable_path=own, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Site:
    """A server of its own whose answers are written by the test, and the page in a tab."""

    def __init__(self, engine: Any, browser: Any, *texts: str, held: bool = False, keys: tuple[str, ...] = ()):
        self.fake = Scripted(engine, *texts, held=held)
        self.app, listener = App(self.fake, "scripted", ServeOptions(api_keys=keys)), bind(port=0)  # type: ignore
        port = listener.getsockname()[1]
        self._thread = threading.Thread(target=run, args=(self.app, listener), daemon=True)
        self._thread.start()
        connect(port).close()
        self.context = browser.new_context()
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda m: self.said.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(f"http://127.0.0.1:{port}/")

    def send(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def answered(self, count: int = 1) -> Any:
        """The last of so many answers, when it is whole."""
        self.page.wait_for_function(
            "n => document.querySelectorAll('article.assistant:not([aria-busy])').length === n", arg=count
        )
        return self.page.locator("article.assistant").last

    def close(self) -> None:
        self.context.close()
        self.app.gate.draining = True
        self._thread.join(20)


@pytest.fixture
def site(engine, browser) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def begin(*texts: str, **options: Any) -> Site:
        sites.append(Site(engine, browser, *texts, **options))
        return sites[-1]

    yield begin
    for one in sites:
        one.close()


def test_a_conversation(site) -> None:
    own = site("<think>They ask.</think>Use **this**:\n```py\nprint(1)\n```\nand `that`.", "Well.", "Better.")
    page = own.page
    own.page.wait_for_function("document.querySelector('#model').textContent === 'scripted'")
    own.send("How?")
    found = own.answered()
    assert found.locator("details.thought summary").text_content().startswith("Thought for ")
    thought = found.locator("details.thought .text")
    assert not thought.is_visible() and thought.text_content() == "They ask."
    assert found.locator("strong").text_content() == "this" and found.locator("p code").text_content() == "that"
    assert found.locator("pre").text_content() == "print(1)\n"
    assert "tokens" in found.locator(".note").text_content()
    assert page.locator("#status").text_content() == "The answer is complete."
    assert page.evaluate("document.activeElement.id") == "say"
    own.send("Again")
    own.answered(2)
    assert "How?" in own.fake.prompts[1] and "Again" in own.fake.prompts[1]
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("Better.").wait_for()
    assert own.fake.prompts[2] == own.fake.prompts[1] and not page.get_by_text("Well.").count()
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0 and own.said == []


def test_what_the_model_says_is_text(site) -> None:
    own = site(f"<think>{HOSTILE}</think>{HOSTILE}\n```{HOSTILE}\n{HOSTILE}\n```")
    own.send(HOSTILE)
    found = own.answered()
    assert HOSTILE in found.locator(".text").last.text_content()
    assert own.page.title() == "Chat" and own.page.locator("main img, main script").count() == 0
    assert own.said == []


def test_the_policy_holds_even_if_the_page_did_not(site) -> None:
    own = site()
    own.page.evaluate("""() => {
        const script = document.createElement("script");
        try { script.text = "document.title = 'taken'"; } catch { return; }
        document.body.append(script);
    }""")
    assert own.page.title() == "Chat"
    assert not own.page.evaluate("fetch('http://127.0.0.1:1/').then(() => true, () => false)")
    assert any("Content Security Policy" in text or "TrustedScript" in text for text in own.said)


def test_settings_reach_the_server(site) -> None:
    own = site("a")
    page = own.page
    page.get_by_text("Settings").click()
    page.get_by_label("Think before answering").uncheck()
    for name, value in (("Temperature", "0.5"), ("Top p", "0.9"), ("Most tokens", "7"), ("Seed", "3")):
        page.get_by_label(name).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    own.send("Hello")
    own.answered()
    (asked,) = own.fake.asked
    assert (asked["temperature"], asked["top_p"], asked["max_new_tokens"]) == (0.5, 0.9, 7)
    assert "<|system|>\nBe brief." in own.fake.prompts[0] and own.fake.prompts[0].endswith("<think></think>")


def test_tools_and_their_results(site) -> None:
    own = site(TWO, "Sunny.")
    page = own.page
    page.get_by_text("Settings").click()
    tools = [{"name": "get_weather", "parameters": {"properties": {"city": {}, "days": {"type": "integer"}}}}]
    page.get_by_label("Tools, a list in JSON").fill(json.dumps(tools))
    own.send("Weather?")
    found = own.answered()
    assert found.locator(".call h3").all_text_contents() == ["Call of get_weather"] * 2
    assert json.loads(found.locator(".call pre").first.text_content()) == {"city": "Paris", "days": 3}
    results = page.get_by_label("Result of get_weather")
    results.nth(0).fill("sun")
    results.nth(1).fill("rain")
    page.get_by_role("button", name="Send results").click()
    page.get_by_text("Sunny.").wait_for()
    prompt = own.fake.prompts[1]
    assert "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response>" in prompt
    assert "<arg_value>Rome</arg_value>" in prompt and "They ask." in prompt and own.said == []


def test_stop_ends_the_answer(site) -> None:
    own = site(held=True)
    own.send("Hello")
    own.page.wait_for_function("!document.querySelector('#stop').hidden")
    for _ in range(500):
        if own.fake.requests:
            break
        own.page.wait_for_timeout(10)
    (request,) = own.fake.requests
    request.push(Delta(text="Half an"))
    request.push(Delta(text=" answer"))
    own.page.get_by_text("Half an").wait_for()
    assert own.page.locator("article.assistant").get_attribute("aria-busy") == "true"
    own.page.keyboard.press("Escape")
    found = own.answered()
    assert "stopped" in found.locator(".note").text_content() and own.page.locator("#stop").is_hidden()
    for _ in range(500):
        if request.finish_reason:
            break
        own.page.wait_for_timeout(10)
    assert request.finish_reason == "cancelled"
    own.send("Go on")
    own.page.wait_for_function("!document.querySelector('#stop').hidden")
    own.page.get_by_role("button", name="Stop").click()
    own.answered(2)


def test_errors_and_the_key(site) -> None:
    own = site("Hello.", keys=("right",))
    page = own.page
    own.send("Hi")
    page.get_by_role("alert").wait_for()
    assert "an API key is needed" in page.get_by_role("alert").text_content()
    key = page.get_by_label("API key")
    assert key.get_attribute("type") == "password" and page.evaluate("document.activeElement.id") == "key"
    key.fill("right")
    page.get_by_role("button", name="Retry").click()
    assert "Hello." in own.answered().text_content() and page.get_by_role("alert").count() == 0
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.get_by_label("Tools, a list in JSON").fill("[{")
    own.send("Again")
    page.get_by_text("the tools are not valid JSON").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_can_be_read_and_reached(site, scheme) -> None:
    """Every control has a name, and text stands out from its ground by 4.5 to 1 at least (WCAG AA)."""
    own = site("<think>a</think>b `c`")
    page = own.page
    page.emulate_media(color_scheme=scheme)
    own.send("Hi")
    own.answered()
    page.get_by_text("Settings").click()
    unnamed = page.evaluate("""() => [...document.querySelectorAll("input, textarea, button, summary")]
        .filter((e) => !(e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)""")
    assert unnamed == []
    ratios = page.evaluate(CONTRAST)
    assert ratios and min(ratios.values()) >= 4.5, ratios


CONTRAST = """() => {
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => parts(color).slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if ((parts(color)[3] ?? 1) > 0) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const found = {};
    for (const e of document.querySelectorAll("h1, h2, p, code, label, button, summary, span, input, textarea")) {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
        found[e.tagName + "." + e.className + "#" + e.id] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }
    return found;
}"""
