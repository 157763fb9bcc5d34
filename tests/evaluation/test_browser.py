"""The pages in a real browser, where there is one: their scripts run, and no others."""

import html
import json
import re
import shutil
import subprocess

import pytest

from meal_fast.evaluation import report
from meal_fast.evaluation.comparison_report import render
from tests.evaluation.test_comparison import GRID, META, compared, finished
from tests.evaluation.test_report import result, run  # noqa: F401  (fixtures)

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
TAKE = "document.title='taken'"
HOSTILE = f"</script><script>{TAKE}</script><img src=x onerror={TAKE}>"


def opened(page, folder, driver=""):
    """What the browser makes of a page; `driver`: a script of the test's own, let in for it."""
    if driver:
        page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
        page = page.replace("</body>", f"<script>{driver}</script></body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'user'}"]
    command = [BROWSER, *options, "--dump-dom", (folder / "page.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return found.stdout


def noted(dom):
    return json.loads(html.unescape(re.search(r"<pre id=\"noted\">(.*?)</pre>", dom)[1]))


NOTE = """
const noted = document.createElement("pre");
noted.id = "noted";
noted.textContent = JSON.stringify(seen);
document.body.append(noted);
"""


def test_the_slider_shows_the_answers_of_its_weight_and_hostile_text_stays_text(
    run,  # noqa: F811
    result,  # noqa: F811
    tmp_path,
):
    for answer in result["answers"]:
        answer["text"] += HOSTILE
    config = json.loads((run / "config.json").read_text())
    page = report.render(result, config, [], title="mine" + HOSTILE)
    dom = opened(page, tmp_path)
    assert 'class="knob live"' in dom  # its script ran, under the page's own policy
    assert "<title>taken" not in dom and "<img" not in dom
    let_in = page.replace("</body>", f"<script>{TAKE}</script></body>")
    assert "<title>taken" not in opened(let_in, tmp_path)  # the policy knows ours by its hash
    driver = """
    const slider = document.querySelector(".knob input"), seen = [];
    for (const at of ["0", "3", "4"]) {
      slider.value = at;
      slider.dispatchEvent(new Event("input"));
      const visible = [...document.querySelectorAll(".at")].filter((x) => x.offsetHeight > 0);
      seen.push([slider.getAttribute("aria-valuetext"), visible.map((x) => x.dataset.at),
        visible[0].querySelector("blockquote").textContent]);
    }"""
    seen = noted(opened(page, tmp_path, driver + NOTE))
    first = [a for a in result["answers"] if a["model"] == "policy"][: len(result["weights"])]
    for at, (said, visible, text) in zip((0, 3, 4), seen, strict=True):
        w = result["weights"][at]
        assert said == f"first={w[0]:.2f}, second={w[1]:.2f}"
        assert visible == [str(at)] * (2 * len(result["shown"]))
        assert text == first[at]["text"].strip()


def test_methods_are_hidden_and_points_say_what_they_are(tmp_path):
    page = render(compared([finished(m, s) for m in (META, GRID) for s in range(3)]))
    driver = """
    const fronts = document.querySelector(".fronts"), seen = {};
    const shown = () => [...new Set([...fronts.querySelectorAll("g[data-method]:not(.off)")]
      .map((x) => x.dataset.method))];
    seen.before = shown();
    fronts.querySelectorAll("input")[1].click();
    seen.without = shown();
    fronts.querySelector("button[value=none]").click();
    seen.none = shown();
    fronts.querySelector("button[value=all]").click();
    seen.all = shown();
    const point = fronts.querySelector("g[data-method='1'] .point");
    point.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    seen.said = fronts.querySelector("output").textContent;
    seen.near = [...fronts.querySelectorAll("g.near")].map((x) => x.dataset.method);"""
    seen = noted(opened(page, tmp_path, driver + NOTE))
    assert seen["before"] == seen["all"] == ["0", "1", "2"]
    assert seen["without"] == ["0", "2"] and seen["none"] == []
    assert seen["said"] == f"{META.name} at first=1, second=0: first 1, second 0, PU 0.3"
    assert seen["near"] == ["1", "1"]  # in both panels
