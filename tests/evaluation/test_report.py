"""The page and the front's picture: self-contained, escaped, saying no more than was measured."""

import copy
import html.parser
import json
import re

import pytest
import torch
from markupsafe import escape

from meal_fast import report as command
from meal_fast.data.objectives import load_objectives
from meal_fast.data.prompts import load_prompts
from meal_fast.data.reward_statistics import Normalizer
from meal_fast.evaluation import report
from meal_fast.evaluation.evaluator import evaluate
from tests.helpers.run_folder import build_run, tiny_config

NASTY = '<script>alert("1")</script> & <img src=https://example.org/x.png>'


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny <b>"
    config = tiny_config()
    policy = build_run(folder, config)
    result = evaluate(
        policy,
        load_objectives(config.objectives, torch.device("cpu")),
        Normalizer.fit(torch.eye(2), "max"),
        (1.1, 1.1),
        0.1,
        load_prompts(str(folder / "prompts.txt"), "evaluation", whole=True),
        config,
    )
    result["prompts"][0]["text"] = NASTY
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
        if tag not in ("meta", "img", "br", "path", "use", "rect", "link"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag in self.stack:
            assert self.stack.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        self.text.append(data)


def test_page_fetches_nothing_runs_nothing_and_is_well_formed(page):
    parsed = Tags(page)
    assert parsed.stack == []
    assert not {"script", "img", "link", "iframe", "object"} & set(parsed.tags)
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
        for model in ("base", "trained"):
            entry = result["results"][model][mode]
            assert f"|{report.interval(entry['hypervolume'])}|" in text
            assert f"|{report.interval(entry['pu'])}|" in text
        assert f"|{report.signed(result['difference'][mode]['hypervolume'])}|" in text
    assert report.headline(result) in text


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
    assert "Training</h2>" not in report.write_report(bare).read_text(encoding="utf-8")
    (bare / "metrics.jsonl").write_text('{"update": 0, "score": 1.0}\n{"update": 1, "sc')
    assert "Training</h2>" in report.write_report(bare).read_text(encoding="utf-8")
    (bare / "metrics.jsonl").write_text('{"update": 0, "sc\n{"update": 1, "score": 1.0}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        report.write_report(bare)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (estimate(0.1, 0.05, 0.15), "Training raised the hypervolume"),
        (estimate(-0.1, -0.15, -0.05), "Training lowered the hypervolume"),
        (estimate(0.1, -0.05, 0.25), "Training did not measurably change the hypervolume"),
        (estimate(0.1, None, None), "Training moved the hypervolume"),
    ],
)
def test_headline_claims_what_the_interval_allows(result, difference, said):
    changed = copy.deepcopy(result)
    changed["difference"]["sampled"]["hypervolume"] = difference
    assert report.headline(changed).startswith(said)


@pytest.mark.parametrize(
    ("ends", "rho", "said"),
    [
        (estimate(0.5, 0.2, 0.8), 0.9, "first rises by 0.50 (0.20 to 0.80) with Spearman 0.90"),
        (estimate(-0.5, -0.8, -0.2), -1.0, "first falls by −0.50 (−0.80 to −0.20)"),
        (estimate(0.1, -0.2, 0.4), None, "first does not measurably change: +0.10"),
    ],
)
def test_headline_says_whether_the_policy_follows_its_weights(result, ends, rho, said):
    changed = copy.deepcopy(result)
    entry = changed["results"]["trained"]["sampled"]
    entry["ends"]["first"]["raw"] = ends
    entry["spearman"]["first"] = estimate(rho, None, None)
    assert said in report.headline(changed)


def test_a_run_that_was_not_evaluated_says_what_to_do(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"python -m meal_fast.evaluate {tmp_path}" in error


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>")
# What the figures and numbers are looked up by: another text there is another place, or none.
KEYS = {"id", "prompt", "model", "preference_text", "names"}


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
        assert not {"script", "img"} & set(Tags(page).tags)
        assert not any(key.startswith("on") for key, _ in Tags(page).attributes)


def test_the_page_s_policy_allows_no_script(page):
    policy = next(value for _, value in Tags(page).attributes if "default-src" in (value or ""))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
