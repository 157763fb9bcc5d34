"""The page and the front's picture: self-contained, escaped, saying no more than was measured."""

import base64
import copy
import hashlib
import html.parser
import json
import re

import pytest
from markupsafe import escape

from meal_fast import report as command
from meal_fast.data.prompts import load_prompts
from meal_fast.evaluation import report
from meal_fast.evaluation.html_page import TEMPLATES
from meal_fast.evaluation.verdict import verdict
from meal_fast.evaluation.wording import interval, signed
from tests.helpers.run_folder import build_run, evaluated, tiny_config

NASTY = '<script>alert("1")</script> & <img src=https://example.org/x.png>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny <b>"
    config = tiny_config(evaluation={"marks": ["refuses", "both"], "ask": "Write a word."})
    policy = build_run(folder, config)
    benign = load_prompts("world:tiny", "train")[:3]
    result = evaluated(folder, config, policy, benign=benign)
    result["shown"][0]["text"] = NASTY
    result["answers"][0]["text"] = NASTY
    (folder / "evaluation.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def page(run):
    return report.write_report(run).read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.stack, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "path", "use", "rect", "link", "input"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag in self.stack:
            assert self.stack.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        self.text.append(data)


def test_page_fetches_nothing_and_is_well_formed(page):
    parsed = Tags(page)
    assert parsed.stack == []
    assert not {"img", "link", "iframe", "object"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
        assert "url(" not in (value or "") or "url(#" in value
    assert (
        "@import" not in page
        and "http:" not in page
        and "https:" not in page.replace(str(escape(NASTY)), "")
    )


def test_texts_of_models_prompts_and_files_are_escaped(page):
    assert page.count(str(escape(NASTY))) == 2
    assert "<title>tiny &lt;b&gt;</title>" in page


def test_every_figure_is_on_the_page_and_in_the_pages_colours(page):
    drawn = re.findall(r'<svg role="img"[^>]*aria-label="([^"]*)"', page)
    assert drawn == [
        "Front of first and second, sampled",
        "Front of first and second, greedy",
        "Answers marked refuses against w",
        "Answers marked both against w",
        "Mean reward of first against its weight",
        "Mean reward of second against its weight",
        "PU against w",
        "Normalised rewards",
        "Score",
        "KL to the base model",
        "Norm of the meta-update ‖Δ‖",
        "cos(Δ₁, Δ₂) of the tasks",
    ]
    figures = page[page.index("<svg") : page.rindex("</svg>")]
    assert "var(--s0)" in figures and not re.search(r"fill: #[0-9a-f]{6}", figures)
    for width, height in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', page):
        assert float(width) > 200 and float(height) > 150


def test_numbers_of_the_table_are_those_of_the_evaluation(page, result):
    text = re.sub(r"<[^>]+>", "|", page)
    for mode in ("sampled", "greedy"):
        for model in ("base", "policy"):
            entry = result["results"][model][mode]
            assert f"|{interval(entry['hypervolume'])}|" in text
            assert f"|{interval(entry['pu'])}|" in text
        assert f"|{signed(result['difference'][mode]['hypervolume'])}|" in text


@pytest.mark.reliability("hour", "a report that does not begin with whether the knob works")
def test_the_verdict_is_the_first_thing_on_the_page(page, result):
    first = page[: page.index("<h2>")]
    for about, said in verdict(result):
        assert f"<b>{about}</b>: {escape(said)}</li>" in first
    headings = re.findall(r"<(?:h2|summary)>([^<]*)<", page)
    assert headings[:4] == [
        "Turn the knob",
        "Fronts",
        "What a weight buys",
        "Measures of the whole sweep",
    ]


def test_front_png_and_rendering_again_from_the_command_line(run, page, capsys):
    (run / "front.png").unlink()
    command.main([str(run)])
    assert (run / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (run / "report.html").read_text(encoding="utf-8") == page
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert not list(run.glob("*.tmp"))


def test_a_run_without_metrics_or_with_a_cut_last_line_still_has_a_report(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "evaluation.json"):
        (bare / name).write_bytes((run / name).read_bytes())
    assert "<summary>Training<" not in report.write_report(bare).read_text(encoding="utf-8")
    (bare / "metrics.jsonl").write_text('{"update": 0, "score": 1.0}\n{"update": 1, "sc')
    assert "<summary>Training<" in report.write_report(bare).read_text(encoding="utf-8")
    (bare / "metrics.jsonl").write_text('{"update": 0, "sc\n{"update": 1, "score": 1.0}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        report.write_report(bare)


def test_every_swept_weight_is_on_the_slider_and_its_ends_are_read_without_script(page, result):
    slider = re.search(r'<input id="knob"[^>]*max="(\d+)"', page)
    assert slider and int(slider[1]) == len(result["weights"]) - 1
    places = re.findall(r'<div class="at( end)?" data-at="(\d+)"><p class="w">([^<]*)<', page)
    one = [(i, bool(end), w) for end, i, w in places[: len(result["weights"])]]
    assert one == [
        (str(i), 1.0 in w, f"first={w[0]:.2f}, second={w[1]:.2f}")
        for i, w in enumerate(result["weights"])
    ]
    assert len(places) == len(result["shown"]) * 2 * len(result["weights"])
    assert ".at:not(.end),.live .at{display:none}" in page  # `live` is set by the script alone


def test_the_answers_of_a_weight_stand_beside_each_other(page, result):
    """Of the last prompt, whose texts no test spoils."""
    prompt = result["shown"][-1]
    section = page[page.index(f"<h3>{escape(prompt['text'])}</h3>") :]
    section = section[: section.index("</section>")]
    for model in ("policy", "base"):
        box = section[section.index(f'<div class="answer {model}">') :]
        said = re.findall(r"<blockquote>(.*?)</blockquote>", box, re.DOTALL)
        own = [a for a in result["answers"] if (a["prompt"], a["model"]) == (prompt["id"], model)]
        assert [a["w"] for a in own] == result["weights"]
        texts = [str(escape(a["text"].strip())) or "<em>(empty)</em>" for a in own]
        assert said[: len(own)] == texts


def test_a_warm_start_has_its_columns_lines_and_answers(run, result):
    three = copy.deepcopy(result)
    base, policy = three["results"]["base"], three["results"]["policy"]
    three["results"] = {"base": base, "warmup": copy.deepcopy(policy), "policy": policy}
    three["added"] = {"warmup": three["difference"], "policy": three["difference"]}
    three["answers"] += [a | {"model": "warmup"} for a in three["answers"] if a["model"] == "base"]
    three["benign"] = None
    page = report.render(three, json.loads((run / "config.json").read_text()), [], title="three")
    heads = re.findall(r"<th>([^<]*)</th>", page)
    assert heads[-5:] == [
        "base",
        "warm start",
        "trained",
        "warm start − base",
        "trained − warm start",
    ]
    assert page.count('<div class="answer warmup">') == len(three["shown"])
    drawn = page[page.index("<svg") :]
    assert drawn.count(">warm start<") >= 5  # legends
    assert "the warm start added" in page


def test_an_evaluation_of_an_older_version_still_has_a_report(run, result, tmp_path):
    """As it was written: the policy was called trained, answers were at five weights, no marks."""
    old = copy.deepcopy(result)
    for new in ("added", "meant", "benign", "shown"):
        del old[new]
    for new in ("benign", "marks"):
        del old["settings"][new]
    old["results"]["trained"] = old["results"].pop("policy")
    ids = [p["id"] for p in old["prompts"]]
    old["answers"] = [
        a | {"model": {"policy": "trained"}.get(a["model"], a["model"])}
        for a in old["answers"]
        if a["prompt"] in ids and a["w"][0] in (0, 1)
    ]
    for modes in old["results"].values():
        for entry in modes.values():
            for point in entry["points"]:
                del point["marks"]
            del entry["mark_ends"], entry["prompt_marks"]
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<b>front</b>" in page and "Answers marked" not in page
    assert re.search(r'<input id="knob"[^>]*max="1"', page)


def test_a_run_that_was_not_evaluated_says_what_to_do(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"python -m meal_fast.evaluate {tmp_path}" in error


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>")
# What the figures and numbers are looked up by: another text there is another place, or none.
KEYS = {"id", "prompt", "model", "preference_text", "names", "marks", "meant", "kind"}


def spoilt(value, text, key=""):
    """`value` with `text` behind every string in it, but those that are looked up."""
    if isinstance(value, dict):
        return {k: spoilt(v, text, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [spoilt(v, text, key) for v in value]
    return value + text if isinstance(value, str) and key not in KEYS else value


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_any_file_becomes_markup(run, text):
    result = json.loads((run / "evaluation.json").read_text())
    config = json.loads((run / "config.json").read_text())
    name = result["names"][0]
    renamed = json.loads(json.dumps(result).replace(f'"{name}"', json.dumps(name + text)))
    for given in (spoilt(result, text), renamed):
        page = report.render(given, spoilt(config, text), [], title=text)
        assert text not in page and str(escape(text)) in page
        parsed = Tags(page)
        assert parsed.tags.count("script") == 1 and "img" not in parsed.tags
        assert not any(key.startswith("on") for key, _ in parsed.attributes)


def test_the_page_s_policy_allows_its_own_script_and_no_other(page):
    policy = next(value for _, value in Tags(page).attributes if "default-src" in (value or ""))
    code = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert code == (TEMPLATES / "knob.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
