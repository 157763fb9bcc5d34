"""The README's table of measurements is made from the committed rows."""

import json

import rows
import table

ROW = {
    "op": "linear_policy_loss",
    "case": "4,096 tokens",
    "device": "cpu",
    "command": "pytest bench/",
    "machine": {"cpu": "a CPU", "cores": 2},
    "versions": {"python": "3.11", "torch": "2.13"},
    "seconds": {"meal-fast": 0.5, "eager": 1.0},
    "peak_mib": {"meal-fast": 40, "eager": 2048},
}


def test_the_readme_says_what_the_rows_say():
    text = table.README.read_text(encoding="utf-8")
    assert table.PLACE.search(text)
    assert table.rendered(text) == text


def test_the_newest_row_of_a_case_counts(tmp_path):
    newer = ROW | {"seconds": {"meal-fast": 0.002, "eager": 0.005}}
    other = ROW | {"op": "sample", "seconds": {"meal-fast": 3e-6}, "peak_mib": {"meal-fast": 1}}
    lines = [{"bench": "grpo-step"}, ROW, other, newer]
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = "before\n<!-- bench: cpu -->\nold\n<!-- /bench -->\nafter\n"
    assert table.rendered(text, tmp_path) == (
        "before\n<!-- bench: cpu -->\n"
        "| op | case | meal-fast | eager |\n"
        "|---|---|---|---|\n"
        "| `linear_policy_loss` | 4,096 tokens | 2 ms, 40 MiB | 5 ms (×2.5), 2 GiB |\n"
        "| `sample` | 4,096 tokens | 3 µs, 1 MiB | – |\n"
        "\n"
        "`pytest bench/` on 2 cores of a CPU; python 3.11, torch 2.13.\n"
        "<!-- /bench -->\nafter\n"
    )
    text = text.replace("cpu", "h200")
    assert "Nothing measured yet." in table.rendered(text, tmp_path)


def test_versions_are_of_what_is_installed():
    found = rows.versions("torch", "no-such-package")
    assert set(found) == {"python", "torch"}
