"""Every field of every file that a page is made of, hostile: no script runs, nothing is fetched."""

import copy
import http.server
import json
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meal_fast.config.config import from_dict, to_dict
from meal_fast.config.run_dir import read_config
from meal_fast.data.prompts import load_prompts
from meal_fast.evaluation import comparison_run, plots, report
from meal_fast.evaluation.comparison_report import render
from meal_fast.evaluation.model_card import model_card
from meal_fast.evaluation.stored import read_evaluation, upgraded
from tests.evaluation.test_comparison import GRID, META, compared, finished
from tests.helpers.run_folder import build_run, evaluated, tiny_config

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
TAKE = "document.title='pwned'"
FETCH = "http://127.0.0.1:{port}/pwned"
# What breaks out of text, of an attribute, of a script and of a style sheet, and what fetches.
HOSTILE = (
    f"</title></style></script><script>{TAKE};alert(1)</script>",
    f'"\'><img src=x onerror="{TAKE}"><svg/onload={TAKE}>',
    f"javascript:{TAKE}",
    f"&#x3c;script&#x3e;{TAKE}&lt;/script>",
    f"--><a href='javascript:{TAKE}' autofocus onfocus={TAKE}>\\u202e\\g<0>\\1",
    "<link rel=stylesheet href={fetch}><img src={fetch}><iframe src={fetch}></iframe>"
    "<style>@import '{fetch}';*{{background:url({fetch})}}</style><base href={fetch}>"
    "<meta http-equiv=refresh content='0;url={fetch}'>",
    "{{{{7*7}}}}{{% raw %}}$(id)`id`\0\x1b]52;c;x\x07\u202e",
)
ODD = ("1e999", "NaN", {"__html__": HOSTILE[0]}, [[[[]]]], True, None, 10**400, -1e308, "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "theirs"
    config = tiny_config(
        evaluation={"marks": ["refuses", "both"], "ask": "Write a word.", "prompts": 2, "grid": 3}
    )
    policy = build_run(folder, config)
    benign = load_prompts("world:tiny", "train")[:2]
    result = evaluated(folder, config, policy, benign=benign)
    (folder / "evaluation.json").write_text(json.dumps(result))
    return folder


def leaves(value, path=()):
    """Every place of a JSON value: of its leaves, and of its keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key), True
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:1]):
            yield from leaves(inner, (*path, i))
    else:
        yield path, False


def planted(value, path, is_key, hostile):
    """The value with one leaf, or one key, that is hostile."""
    changed = copy.deepcopy(value)
    inside = changed
    for part in path[:-1]:
        inside = inside[part]
    if is_key:
        inside[hostile if isinstance(hostile, str) else str(hostile)[:99]] = inside.pop(path[-1])
    else:
        inside[path[-1]] = hostile
    return changed


def texts(value):
    """The value with every text in it hostile, each in its turn, and its keys as they are."""
    count = iter(range(1 << 30))

    def put(inside):
        if isinstance(inside, dict):
            return {key: put(inner) for key, inner in inside.items()}
        if isinstance(inside, list):
            return [put(inner) for inner in inside]
        return inside + HOSTILE[next(count) % len(HOSTILE)] if isinstance(inside, str) else inside

    return put(value)


@contextmanager
def opened():
    """A browser that notes what a page tries: `see(page)` gives title, errors and requests."""
    api = pytest.importorskip("playwright.sync_api")
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with api.sync_playwright() as play:
        chrome = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chrome.new_page()
        dialogs: list[str] = []
        page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
        requests: list[str] = []
        page.on("request", lambda r: requests.append(r.url))

        def see(path: Path):
            dialogs.clear(), requests.clear(), asked.clear()
            page.goto(path.as_uri())
            page.mouse.move(200, 200)
            page.wait_for_timeout(50)
            return page.title(), list(dialogs), [u for u in requests if u != path.as_uri()], asked

        yield see, server.server_address[1]
        chrome.close()
    server.shutdown()


def assert_harmless(seen, where):
    title, dialogs, requests, asked = seen
    assert not title.startswith("pwned") and dialogs == [], where
    assert [u for u in requests if not u.startswith("data:")] == [] and asked == [], where


def written(run, tmp_path, name, text):
    """The report of a copy of the run, one of whose files is another; None: it was refused."""
    there = tmp_path / "run"
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    for file in ("config.json", "evaluation.json", "metrics.jsonl", "statistics.json"):
        shutil.copy(run / file, there)
    (there / name).write_text(text)
    return report.write_report(there)


@browser
@pytest.mark.reliability("attack", "script in every text and key of the files that a report reads")
def test_no_text_of_a_report_is_a_script(run, tmp_path):
    hostile = {"evaluation.json": read_evaluation(run)}
    hostile["config.json"] = json.loads((run / "config.json").read_text())
    with opened() as (see, port):
        fill = {"fetch": FETCH.format(port=port)}
        for text in (t.format(**fill) if "{" in t else t for t in HOSTILE):
            result = copy.deepcopy(hostile["evaluation.json"])
            for prompt in [*result["prompts"], *result["shown"], *result["benign"]["prompts"]]:
                prompt["text"] += text
            for answer in result["answers"]:
                answer["text"] += text
            result["asked"] = [[w, said + text] for w, said in result["asked"]]
            result["settings"] |= {"ask": text, "benign": text}
            result["versions"] = {text: text, "python": text}
            page = written(run, tmp_path, "evaluation.json", json.dumps(result))
            assert_harmless(see(page), text)
            assert "pwned" in page.read_text() or "fetch" not in text
            config = copy.deepcopy(hostile["config.json"])
            config["policy"]["path"] = config["prompts"]["train"] = text.replace("\0", "")
            config["objectives"] = [f"first={text}", f"second={text}"]
            config["objectives"] = [o.replace("\0", "") for o in config["objectives"]]
            assert_harmless(see(written(run, tmp_path, "config.json", json.dumps(config))), text)


@browser
@pytest.mark.slow
@pytest.mark.reliability("attack", "each field and key of a report's files, hostile in turn")
def test_each_field_of_a_report_is_refused_or_harmless(run, tmp_path, record_property, monkeypatch):
    result, config = (json.loads((run / f"{n}.json").read_text()) for n in ("evaluation", "config"))
    updates = (run / "metrics.jsonl").read_text().splitlines()
    refused = drawn = 0
    with opened() as (see, _):
        for name, value in (
            ("evaluation.json", result),
            ("config.json", config),
            ("metrics.jsonl", json.loads(updates[-1])),
        ):
            for i, (path, is_key) in enumerate(leaves(value)):
                odd = (*HOSTILE[:5], *ODD)[i % (5 + len(ODD))]
                text = json.dumps(planted(value, path, is_key, odd))
                if name == "metrics.jsonl":
                    text = "\n".join([*updates[:-1], text, updates[0], ""])
                with monkeypatch.context() as patched:
                    if i % 4:  # figures take a second: of each fourth field only
                        patched.setattr(report, "figure", lambda *_: "")
                        patched.setattr(plots, "save_png", lambda *_: None)
                    try:
                        page = written(run, tmp_path, name, text)
                    except ValueError as error:
                        assert "\n" not in str(error).strip(), (path, odd)
                        refused += 1
                        continue
                drawn += 1
                if isinstance(odd, str | dict):
                    assert_harmless(see(page), (name, path, odd))
    assert drawn > 40 and refused > 200
    record_property("hostile fields refused in a line", refused)
    record_property("hostile fields shown, harmless", drawn)


@pytest.mark.reliability("attack", "a number of an evaluation that is a script, or no number")
@pytest.mark.parametrize("odd", [HOSTILE[0], *ODD], ids=lambda odd: str(odd)[:12])
@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("evaluation.json", ("results", "policy", "sampled", "points", 0, "raw", "first", "value")),
        ("evaluation.json", ("results", "base", "greedy", "tokens_per_second")),
        ("evaluation.json", ("answers", 0, "reward", "second")),
        ("evaluation.json", ("weights", 1, 0)),
        ("evaluation.json", ("settings", "temperature")),
        ("metrics.jsonl", ("normalized", "first")),
        ("metrics.jsonl", ("update",)),
    ],
    ids=lambda p: ".".join(map(str, p)) if isinstance(p, tuple) else None,
)
def test_a_number_that_is_none_is_refused_by_file_and_field(run, tmp_path, file, path, odd):
    text = (run / file).read_text()
    value = json.loads(text if file == "evaluation.json" else text.splitlines()[0])
    changed = json.dumps(planted(value, path, False, odd)) + "\n"
    undefined = odd is None and (path[-1] in ("value", "first", "second"))
    if undefined:  # what has no value is a null, and shown as a dash
        written(run, tmp_path, file, changed)
        return
    with pytest.raises(ValueError) as refused:
        written(run, tmp_path, file, changed)
    said = str(refused.value)
    assert file in said and "\n" not in said and len(said) < 400
    assert "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)[1:] in said


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"names": ["a"], "names": ["b"]}',
        '{"mu": NaN}',
        '{"mu": 1e999}',
        '{"mu": 1' + "0" * 5000 + "}",
        '"a text"',
        "\x00\x00\x00",
        '{"results": [], "names": 1}',
        "{",
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.reliability("attack", "an evaluation nested 100,000 deep, with keys twice, NaN, 1e999")
def test_a_broken_evaluation_is_one_line(run, tmp_path, text):
    with pytest.raises(ValueError, match=r"evaluation\.json") as refused:
        written(run, tmp_path, "evaluation.json", text)
    assert "\n" not in str(refused.value)


@browser
@pytest.mark.reliability("attack", "script in every text that a comparison's page shows")
def test_no_text_of_a_comparison_is_a_script(tmp_path):
    runs = [finished(m, s) for m in (META, GRID) for s in range(3)]
    for one in runs:
        one.evaluation["asked"] = [[w, "x"] for w in one.evaluation["weights"][:4]]
    result = compared(runs)
    result["failed"] = [{"run": "a/seed-0", "reason": "exit code 1: x (log)"}]
    result["notes"] = ["A note. " * 60, "Another."]
    with opened() as (see, port):
        (tmp_path / "plain.html").write_text(render(result))
        assert see(tmp_path / "plain.html")[0] == f"{result['preset']}: methods compared"
        fill = {"fetch": FETCH.format(port=port)}
        for text in (t.format(**fill) if "{" in t else t for t in HOSTILE):
            bad = copy.deepcopy(result) | {"command": text, "code": text, "policy": text}
            bad["preset"] += text
            bad["notes"] = [note + text for note in result["notes"]]
            bad["failed"] = [{"run": text, "reason": text}]
            bad["settings"] = result["settings"] | {"ask": text}
            for method in bad["methods"]:
                if method.get("asked"):
                    method["asked"] = [[w, said + text] for w, said in method["asked"]]
            (tmp_path / "page.html").write_text(render(bad))
            assert_harmless(see(tmp_path / "page.html"), text)


@pytest.mark.reliability("attack", "cost.json, runs.json and statistics.json that hold no numbers")
@pytest.mark.parametrize("odd", [HOSTILE[0], *ODD], ids=lambda odd: str(odd)[:12])
def test_a_comparison_refuses_files_of_other_shapes(tmp_path, odd):
    from meal_fast.evaluation.comparison_spec import parse

    argv = ["tiny", "--tokens", "100000", "--recipes", "grid-grpo", "--seeds", "0"]
    plan, _ = parse([*argv, "--out", str(tmp_path)], "")
    record = {"preset": "tiny", "tokens": plan.tokens, "runs": {"x": odd}}
    (tmp_path / "runs.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"runs\.json"):
        comparison_run.Record(plan)


@pytest.mark.reliability("attack", "names that would break out of a model card")
def test_a_card_shows_names_and_runs_none_of_them(run, tmp_path):
    nasty = [
        "x](javascript:alert(1)) <script>alert(1)</script>",
        '"); import os; os.system("id") #',
        "a|b`c`\n```\n---\n# Title\n\nlicense: mit\n![x](http://127.0.0.1:9/x)",
        "</td><img src=http://127.0.0.1:9/x onerror=alert(1)>",
    ]
    config = read_config(run)
    there = tmp_path / "run"
    shutil.copytree(run, there)
    for name in nasty:
        policy = replace(config.policy, path=f"models/{name.replace('/', '_')}")
        named = replace(
            config,
            policy=policy,
            objectives=(f"first={name}", f"second=owner/x?prompt={name}"),
            prompts=replace(config.prompts, train=f"data/{name}.jsonl"),
        )
        for kind in ("hub", "adapter", "gguf"):
            card = model_card(there, named, kind, title=name)
            head = yaml.safe_load(card.split("---\n")[1])
            assert set(head) <= {"license", "base_model", "library_name", "pipeline_tag", "tags"}
            assert head["license"] == "other"
            html = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
            body = html.render(card.split("---\n", 2)[2])
            assert "<script" not in body and 'href="javascript' not in body, name
            # one picture, the front, where there is one
            assert body.count("<img") == (there / "front.png").is_file(), name
            assert body.count("<h1>") == 1 and body.count("<h2>") >= 5
            for block in card.split("```python\n")[1:]:
                code = compile(block.split("\n```")[0], "card", "exec")
                assert "system" not in code.co_names


@pytest.mark.reliability("attack", "a link in a run folder, to be exported or written through")
def test_links_in_a_run_lead_nowhere(run, tmp_path):
    from meal_fast import export
    from meal_fast.common import write_atomic
    from meal_fast.config.run_dir import check_folder

    secret = tmp_path / "secret"
    secret.write_text("mine")
    there = tmp_path / "run"
    shutil.copytree(run, there)
    for name in ("front.png", "policy/notes.txt"):
        (there / name).unlink(missing_ok=True)
        (there / name).symlink_to(secret)
        with pytest.raises(SystemExit) as stop:
            export.main([str(there), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2 and not (tmp_path / "out").exists()
        (there / name).unlink()
    (there / "evaluation.json.tmp").symlink_to(secret)
    write_atomic(there / "evaluation.json", "{}")
    assert secret.read_text() == "mine" and (there / "evaluation.json").read_text() == "{}"
    assert not (there / "evaluation.json").is_symlink()
    (there / "metrics.jsonl").unlink()
    (there / "metrics.jsonl").symlink_to(secret)
    with pytest.raises(ValueError, match=r"'metrics\.jsonl' is a link"):
        check_folder(read_config(there), there, True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "policy.tmp").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        check_folder(read_config(there), tmp_path / "new", False)


def test_what_is_right_is_read_as_before(run):
    result = json.loads((run / "evaluation.json").read_text())
    assert read_evaluation(run) == result == upgraded(result)
    assert from_dict(to_dict(read_config(run))) == read_config(run)
    assert os.path.getsize(run / "evaluation.json") > 1000
