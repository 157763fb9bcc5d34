"""Runs of every kind are served: models of their own, a guide, a net, rewards in the prompt."""

import threading
from contextlib import nullcontext

import pytest

from meal_fast import train
from meal_fast.data_types import Prompt
from meal_fast.models.model_soup import load_served
from meal_fast.rollout import Request, Sampling, engine
from tests.serving.conftest import serving
from tests.serving.test_api import ASK, ask

RECIPES = ["rewarded-soups", "morlhf", "parm", "meal", "ric"]
WEIGHTS = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]


def named(w):
    return {"first": w[0], "second": w[1]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_served_as_the_engine_answers(recipe, tmp_path):
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
    policy, family = load_served(folder, config)
    request = Prompt("chat", ASK[0]["content"])
    for w in WEIGHTS:
        with nullcontext() if family is None else family.at(policy, w), engine(policy) as sampler:
            alone = sampler.generate([Request(request, w)], Sampling(6, 0.0, seed=0))
        assert alone.texts[0] == found[w]
