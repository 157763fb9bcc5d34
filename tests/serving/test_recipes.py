"""Runs of every kind are served: models of their own, a guide, a net, rewards in the prompt."""

import threading

import pytest

from meal_fast import train
from meal_fast.evaluation.session import Session
from tests.serving.conftest import serving
from tests.serving.test_api import ASK, ask

RECIPES = ["rewarded-soups", "morlhf", "parm", "meal", "ric"]
WEIGHTS = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]


def named(w):
    return {"first": w[0], "second": w[1]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_served_as_chat_answers(recipe, tmp_path):
    folder = tmp_path / "run"
    train.main(["tiny", "--recipe", recipe, "--meta.steps", "1", "--no-evaluate",
                "--out", str(folder)])  # fmt: skip
    with serving(folder, slots=4, waiting=20) as server:
        assert not server.served.unfinished
        found, threads = {}, []
        for w in WEIGHTS:  # at once, and the base model among them

            def one(w=w):
                said = ask(server, preference=named(w), max_tokens=6)
                found[w] = said.json()["choices"][0]["message"]["content"]

            threads.append(threading.Thread(target=one))
        threads.append(threading.Thread(target=lambda: ask(server, model="base", max_tokens=6)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        five = ask(server, preference=None, preferences=[named(w) for w in WEIGHTS], max_tokens=6)
        texts = [c["message"]["content"] for c in five.json()["choices"]]
        assert texts == [found[w] for w in WEIGHTS]
        config = server.served.config
    with Session(folder, config, print, max_new_tokens=6, temperature=0.0, seed=0) as session:
        for turn, w in enumerate(WEIGHTS):
            assert session.answer(ASK[0]["content"], w, turn) == found[w].strip()
