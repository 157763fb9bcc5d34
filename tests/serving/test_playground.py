"""The page in headless Chromium: slide, stream, compare, a link; hostile text stays text."""

import shutil
import types

import pytest

from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, Sampling, engine
from tests.serving.conftest import serving, until

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
SONG = "Write a new song."
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.set_default_timeout(20_000)
    faults, asked = [], []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.faults, opened.asked = faults, asked
    yield opened
    opened.close()
    assert faults == []


@pytest.fixture(scope="module")
def wide(run):
    """Room for five answers, and for what a page that asks again has not let go of yet."""
    with serving(run.folder, slots=8, waiting=16) as there:
        yield there


def greedy(run, w, prompt=SONG, length=8):
    with engine(run.policy) as sampler:
        request = Request(Prompt("chat", prompt), w)
        return sampler.generate([request], Sampling(length, 0.0, seed=0)).texts[0]


def done(page, columns):
    """Waits for all answers and their rewards; their texts."""
    page.wait_for_function(
        "n => document.querySelectorAll('article').length === n"
        " && !document.querySelector('article.busy')"
        " && document.querySelectorAll('.bars > .bar').length >= 2 * n",
        arg=columns,
    )
    return page.locator("article .text").all_text_contents()


def slide(page, value):
    page.locator("#slider").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input'));"
        " e.dispatchEvent(new Event('change')); }",
        str(value),
    )


def test_sliding_asks_again_at_the_new_preference_and_a_link_holds_it(run, wide, page):
    page.goto(wide.url + "#t=0")
    page.fill("#prompt", SONG)
    slide(page, 0.2)
    assert page.locator("#w").text_content() == "first 0.8 · second 0.2"
    page.click("#send")
    assert done(page, 1) == [greedy(run, (0.8, 0.2))]
    slide(page, 1)
    page.wait_for_function(
        "() => document.querySelector('h2').textContent === 'first 0 · second 1'"
    )
    assert done(page, 1) == [greedy(run, (0.0, 1.0))]
    link = page.url
    assert all(url.startswith((wide.url, "data:")) for url in page.asked)
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_function("() => document.getElementById('slider')?.value === '1'")
    assert page.input_value("#prompt") == SONG and page.input_value("#temperature") == "0"
    page.click("#send")
    assert done(page, 1) == [greedy(run, (0.0, 1.0))]


def test_five_preferences_and_the_base_stand_side_by_side(run, wide, page):
    page.goto(wide.url + "#t=0")
    page.fill("#prompt", SONG)
    page.check("#base")
    page.click("#compare")
    texts = done(page, 6)
    weights = [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    assert texts[:5] == [greedy(run, w) for w in weights]
    assert page.locator("article.base").count() == 1
    requests = [url for url in page.asked if url.endswith("/completions")]
    assert len(requests) == 2  # all five in one
    box = page.locator("article").first.bounding_box()
    assert box["y"] == page.locator("article").nth(4).bounding_box()["y"]


def test_an_answer_is_shown_as_it_is_written_and_stopping_frees_its_slot(run, page):
    with serving(run.folder, slots=1) as server:
        kind = type(server.served.policy)
        server.served.policy.__class__ = type("Endless", (kind,), {"stop_ids": frozenset()})
        step = server.worker._step
        budget = [4]

        def slow():
            until(lambda: budget[0] > 0 or server.worker._closing)
            budget[0] -= 1
            step()

        server.worker._step = slow
        page.goto(server.url + "#t=0&n=60")
        page.fill("#prompt", SONG)
        page.click("#send")
        page.wait_for_function("() => document.querySelector('article.busy .text')?.textContent")
        first = page.locator(".text").text_content()
        budget[0] += 4
        page.wait_for_function(
            "t => document.querySelector('.text').textContent.length > t", arg=len(first)
        )
        assert page.locator("article.busy").count() == 1
        assert page.locator(".text").text_content().startswith(first)
        page.click("#stop")
        page.wait_for_function("() => !document.querySelector('article.busy')")
        budget[0] += 1000
        until(lambda: server.worker.outstanding == 0)


def test_hostile_text_stays_text(run, page):
    def ready(served):
        said = served.policy.decode

        def decode(self, tokens):
            return HOSTILE + said(tokens)

        served.policy.decode = types.MethodType(decode, served.policy)
        served.unfinished, served.name = HOSTILE, HOSTILE

    with serving(run.folder, ready=ready) as server:
        page.goto(server.url)
        page.fill("#prompt", SONG + HOSTILE)
        page.click("#send")
        (text,) = done(page, 1)
        assert HOSTILE in text and HOSTILE in page.locator("h1").text_content()
        assert HOSTILE in page.locator("#state").text_content()
        assert page.locator("img").count() == 0 and page.title() == f"{HOSTILE} · meal-fast"
        # And were it put in as markup, the page's own policy would not run it.
        page.evaluate("document.body.insertAdjacentElement('beforeend', new Image())")
        with pytest.raises(playwright.Error, match="TrustedHTML"):
            page.evaluate("h => { document.body.innerHTML = h; }", HOSTILE)


def test_an_unfinished_run_and_an_error_are_said(run, page):
    def ready(served):
        served.unfinished = "3 of 9 meta-steps"

    with serving(run.folder, ready=ready) as server:
        page.goto(server.url)
        page.wait_for_selector("#state:not([hidden])")
        page.fill("#prompt", SONG)
        page.locator("#length").evaluate("e => { e.value = 900000; }")
        page.click("#send")
        page.wait_for_selector("#notice.bad")
        assert "exceed the model's context" in page.locator("#notice").text_content()
        assert "not finished: 3 of 9 meta-steps" in page.locator("#state").text_content()
        assert page.locator("#state").is_visible()


def test_a_token_is_asked_for_and_is_not_in_the_link(run, page):
    with serving(run.folder, token="open-sesame") as server:
        page.goto(server.url)
        page.wait_for_selector("#door:not([hidden])")
        page.fill("#token", "open-sesame")
        page.click("#door button")
        page.wait_for_selector("#slider")
        assert "sesame" not in page.url
    with serving(run.folder, token="open-sesame") as server:
        page.goto(server.url + "#token=open-sesame")
        page.wait_for_selector("#slider")
        assert "sesame" not in page.url


@pytest.mark.parametrize("names", [("a", "b", "c"), ("a", "b", "c", "d")])
def test_three_objectives_are_a_triangle_and_more_are_sliders(run, page, names):
    def ready(served):
        served.names = names

    with serving(run.folder, ready=ready) as server:
        page.goto(server.url)
        if len(names) == 3:
            page.wait_for_selector("svg.triangle")
            box = page.locator("svg.triangle").bounding_box()
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 16 / 196)
            assert page.locator("#w").text_content() == "a 0 · b 0 · c 1"
            page.keyboard.press("ArrowDown")
            assert page.locator("#w").text_content() == "a 0.025 · b 0.025 · c 0.95"
        else:
            page.wait_for_selector(".slide input")
            first = page.locator(".slide input").first
            first.evaluate("e => { e.value = 0.75; e.dispatchEvent(new Event('change')); }")
            assert page.locator("#w").text_content() == "a 0.5 · b 0.167 · c 0.167 · d 0.167"


def test_nothing_is_wider_than_a_telephone(wide, page):
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(wide.url + "#t=0")
    page.fill("#prompt", SONG)
    page.click("#compare")
    done(page, 5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
