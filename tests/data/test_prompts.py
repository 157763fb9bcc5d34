"""Prompt sets: local files, and the hub sets' filters through the real `datasets` loader."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.data.assets.splitting import SPLITS, split_of, text_hash, text_id
from meal_fast.data.prompts import HUB, by_turns, hh_prompt, in_turn, load_prompts, tldr_prompt


def texts(*args, **options) -> list[str]:
    return [prompt.text for prompt in load_prompts(*args, **options)]


def numbered(n: int) -> list[str]:
    return [f"Question number {i}, what is it about?" for i in range(n)]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_split_depends_on_the_text_alone() -> None:
    # fixed for ever: a run's held-out prompts must stay held out with every later version
    assert text_id("What is the capital of France?") == "d832be57fc35827e"
    assert text_id("  what is the Capital, of FRANCE ") == text_id("What is the capital of France?")
    shares = [split_of(text) for text in numbered(4000)]
    assert 0.73 < shares.count("train") / 4000 < 0.77
    assert 0.08 < shares.count("validation") / 4000 < 0.12
    assert 0.13 < shares.count("evaluation") / 4000 < 0.17


def test_local_files_are_split_without_loss_or_overlap(tmp_path: Path) -> None:
    lines = numbered(200)
    jsonl = write(tmp_path / "p.jsonl", [json.dumps({"prompt": t, "x": 1}) for t in lines])
    txt = write(tmp_path / "p.txt", lines)
    parts = {split: texts(jsonl, split) for split in SPLITS}
    assert all(parts.values())
    assert sorted(t for part in parts.values() for t in part) == sorted(lines)
    assert {split: texts(txt, split) for split in SPLITS} == parts
    for split, part in parts.items():
        assert part == [t for t in lines if split_of(t) == split]  # and in the file's order
    assert texts(txt, "evaluation", whole=True) == lines


def test_texts_are_stripped_and_repeats_removed(tmp_path: Path) -> None:
    rows = ["  Hello there ", "hello, THERE!", "Ünïcode — ok?", "line\u2028separator", "+ + ="]
    source = write(
        tmp_path / "p.jsonl", [json.dumps({"prompt": t}, ensure_ascii=False) for t in rows]
    )
    prompts = load_prompts(source, "train", whole=True)
    assert [p.text for p in prompts] == ["Hello there", *rows[2:]]
    assert len({p.id for p in prompts}) == 4
    assert prompts[0].id == text_id("Hello there")


def test_long_prompts_are_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "p.txt", ["one two", "one two three", "one two three four"])
    kept = texts(source, "train", whole=True, count_tokens=lambda t: len(t.split()), max_tokens=3)
    assert kept == ["one two", "one two three"]
    assert texts(source, "train", whole=True, max_tokens=2) == ["one two"]  # 4 characters a token
    with pytest.raises(ValueError, match="nothing is left in the train split"):
        texts(source, "train", whole=True, count_tokens=len, max_tokens=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"line 3: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', r"line 2: needs \{.prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"line 2: needs"),
        ("p.jsonl", b'{"prompt": 3}\n', r"line 1: needs"),
        ("p.jsonl", b'{"prompt": "  "}\n', r"line 1: needs"),
        ("p.jsonl", b"\n\n", "the file has no prompts"),
        ("p.txt", b"", "the file has no prompts"),
        ("p.txt", b"ok\n\xff\xfe\n", "not UTF-8"),
        ("p.csv", b"a\n", r"neither packaged:NAME .* nor a \.jsonl or \.txt"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_broken_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(tmp_path / name), "train")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_folder_and_unknown_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEAL_FAST_CACHE", str(tmp_path))
    (tmp_path / "folder.txt").mkdir()
    for source, split, message in [
        (str(tmp_path / "folder.txt"), "train", "cannot be read"),
        ("packaged:nothing", "train", "choose from safety, benign, mixed"),
        ("packaged:mixed", "train", "run `make assets`"),
        ("packaged:mixed", "test", "split='test'"),
        ("Anthropic/hh-rlhf?path=/no/such", "train", "no folder '/no/such'"),
        ("Anthropic/hh-rlhf?folder=x", "train", "unknown option 'folder=x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_prompts(source, split)


def hub_folder(root: Path, splits: dict[str, list[dict]], config: str | None = None) -> Path:
    """The layout of a hub repository: parquet files a split, and a README that lists them."""
    files = []
    for split, rows in splits.items():
        target = root / "data" / f"{split}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(target))
        files.append(f"  - split: '{split}'\n    path: data/{split}-*")
    header = f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n"
    (root / "README.md").write_text(header + "\n".join(files) + "\n---\n")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def test_ultrafeedback_and_beavertails(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ultra = hub_folder(
        tmp_path / "ultra",
        {
            split: [
                {"prompt": f"{split}: {t}", "prompt_id": str(i), "chosen": message}
                for i, t in enumerate(numbered(n))
            ]
            for split, n in {"train_prefs": 200, "test_prefs": 20, "train_sft": 30}.items()
        },
    )
    source = f"HuggingFaceH4/ultrafeedback_binarized?path={ultra}"
    train, validation = texts(source, "train"), texts(source, "validation")
    assert sorted(train + validation) == sorted(f"train_prefs: {t}" for t in numbered(200))
    assert validation == [
        t for t in (f"train_prefs: {t}" for t in numbered(200)) if text_hash(t) % 20 == 0
    ]
    assert 0 < len(validation) < 25
    assert texts(source, "evaluation") == [f"test_prefs: {t}" for t in numbered(20)]

    beaver = hub_folder(
        tmp_path / "beaver",
        {
            split: [
                {"prompt": f"{split} {i // 2}", "response": f"r{i}", "is_safe": bool(i % 2)}
                for i in range(n)
            ]
            for split, n in {"30k_train": 60, "30k_test": 12}.items()
        },
    )
    source = f"PKU-Alignment/BeaverTails?path={beaver}"
    assert texts(source, "evaluation") == [f"30k_test {i}" for i in range(6)]  # each prompt once
    assert set(texts(source, "train")) <= {f"30k_train {i}" for i in range(30)}


def test_hh_rlhf(tmp_path: Path) -> None:
    one = "\n\nHuman: {} \n\nAssistant: Some good answer."
    two = "\n\nHuman: First {}\n\nAssistant: Answer.\n\nHuman: And then?\n\nAssistant: More."
    rows = [
        {"chosen": (two if i % 3 == 0 else one).format(t), "rejected": "\n\nHuman: no"}
        for i, t in enumerate(numbered(40))
    ]
    rows[4]["chosen"] = one.format("long " * 600)  # over 512 words with the answer
    rows[5]["chosen"] = "\n\nHuman: a\n\nAssistant: b"  # 4 words: under 8
    folder = hub_folder(tmp_path, {"train": rows, "test": rows})
    source = f"Anthropic/hh-rlhf?path={folder}"
    words = {"count_tokens": lambda text: len(text.split())}
    train = texts(source, "train", **words) + texts(source, "validation", **words)
    expected = [hh_prompt(row["chosen"]) for i, row in enumerate(rows) if i not in (4, 5)]
    assert sorted(train) == sorted(expected)
    every_fourth = [hh_prompt(row["chosen"]) for i, row in enumerate(rows) if i % 4 == 0 and i != 4]
    assert texts(source, "evaluation", **words) == every_fourth


def test_hh_prompt_rebuilds_the_dialogue() -> None:
    dialogue = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: D.\n\nmore D"
    prompt = hh_prompt(dialogue)
    assert prompt == "A?\n\nAssistant: B.\n\nHuman: C?"
    assert f"\n\nHuman: {prompt}\n\nAssistant: D.\n\nmore D" == dialogue
    assert hh_prompt("\n\nHuman: A?\n\nAssistant: B") == "A?"


def test_summarize_from_feedback(tmp_path: Path) -> None:
    def row(key: str | None, post: str | None, choice: int = 0) -> dict:
        return {
            "info": {"id": key, "post": post, "title": "t"},
            "summaries": [{"text": "short one"}, {"text": "word " * 500}],
            "choice": choice,
        }

    posts = {f"t3_{i:03}": f"post {i}\n" + "my dog ran away again " * 8 for i in range(30)}
    rows = [row(key, post) for key, post in reversed(posts.items())]
    rows += [row("t3_005", "another text of the same post " * 8)]  # a second comparison
    rows += [row("x1", None), row(None, "p " * 100), row("x2", "p" * 100), row("x3", "p" * 1200)]
    rows += [row("x4", "this one has a summary that is too long " * 4, choice=1)]
    folder = hub_folder(tmp_path, {"train": rows, "validation": rows[:10]}, config="comparisons")
    source = f"openai/summarize_from_feedback?path={folder}"
    words = {"count_tokens": lambda text: len(text.split())}
    train = texts(source, "train", **words) + texts(source, "validation", **words)
    assert sorted(train) == sorted(tldr_prompt(post) for post in posts.values())
    ids = sorted(posts)[-10:]
    assert texts(source, "evaluation", **words) == [tldr_prompt(posts[key]) for key in ids]
    assert "\n" not in train[0] and train[0].endswith("### Response:")


def test_a_hub_set_of_another_schema_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, {"train": [{"question": "a"}], "30k_train": [{"question": "a"}]})
    with pytest.raises(ValueError, match="no column 'prompt' in"):
        load_prompts(f"PKU-Alignment/BeaverTails?path={folder}", "train")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_prompts(f"PKU-Alignment/BeaverTails?path={folder}", "evaluation")


def test_without_a_hub_every_hub_set_says_so() -> None:
    for name in HUB:
        with pytest.raises(ValueError, match=f"prompts '{name}': cannot be loaded"):
            load_prompts(name, "train")


def test_items_have_their_turn_in_another_order_each_time_round():
    items = list("abcdefg")
    taken = in_turn(items, 0, 21, 3, "prompts")
    rounds = [taken[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(r) == items for r in rounds) and len({tuple(r) for r in rounds}) == 3
    for first, count in ((0, 3), (5, 4), (13, 8), (6, 1)):  # whatever was asked for before
        assert in_turn(items, first, count, 3, "prompts") == taken[first : first + count]
    assert in_turn(items, 0, 21, 4, "prompts") != taken
    assert in_turn(items, 0, 21, 3, "other") != taken
    assert in_turn(items, 0, 0, 3, "prompts") == []


@given(
    share=st.floats(0, 0.95),
    count=st.integers(1, 7),
    steps=st.integers(1, 30),
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 9)),
)
def test_two_pools_take_turns_by_their_share(share, count, steps, sizes):
    main = [("main", i) for i in range(sizes[0])]
    other = [("other", i) for i in range(sizes[1])]
    taken = [by_turns(main, other, share, step, count, 3, "x") for step in range(steps)]
    assert all(len(step) == count for step in taken)
    for pool, wanted in ((other, share if other else 0.0), (main, 1 - (share if other else 0.0))):
        seen = [item for step in taken for item in step if item in pool]
        assert abs(len(seen) - wanted * count * steps) <= 1
        # every item has its turn before any has its next
        whole = len(seen) // len(pool) if pool else 0
        for epoch in range(whole):
            assert set(seen[epoch * len(pool) : (epoch + 1) * len(pool)]) == set(pool)
    # a step alone is what it is after the others
    assert by_turns(main, other, share, steps - 1, count, 3, "x") == taken[-1]
