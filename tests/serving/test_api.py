"""OpenAI's client, and raw requests, against a real server on a loopback port."""

import json
import threading

import pytest

from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, Sampling, engine
from tests.serving.conftest import serving, until

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
ASK = [{"role": "user", "content": "Write a new song."}]
W = {"first": 0.8, "second": 0.2}
ENDLESS = {"temperature": 0, "max_tokens": 60}


def client(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def ask(server, **changes):
    body = {"messages": ASK, "preference": W, "temperature": 0} | changes
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def drawn(run, w, sampling, samples=1, history=(), reference=False):
    request = Request(Prompt("chat", ASK[0]["content"]), w, samples, history=history)
    if reference:
        with run.policy.reference() as network, engine(run.policy, network=network) as sampler:
            return sampler.generate([request], sampling)
    with engine(run.policy) as sampler:
        return sampler.generate([request], sampling)


def test_models_are_the_run_and_its_base(server):
    found = client(server).models.list()
    assert [m.id for m in found.data] == ["tiny", "base"]
    about = found.data[0].meal_fast
    assert about["objectives"] == ["first", "second"] and about["auto"] is False
    assert about["unfinished"] == ""


def test_a_seed_gives_the_text_that_generate_gives_streamed_or_not(server, run):
    sampling = Sampling(6, 1.0, seed=7)
    out = drawn(run, (0.8, 0.2), sampling, samples=3)
    how = dict(model="tiny", messages=ASK, seed=7, n=3, temperature=1, max_tokens=6)
    extra = {"preference": W}
    whole = client(server).chat.completions.create(**how, extra_body=extra)
    assert tuple(c.message.content for c in whole.choices) == out.texts
    assert tuple(c.finish_reason for c in whole.choices) == out.finish
    assert [c.preference for c in whole.choices] == [W] * 3
    assert whole.usage.prompt_tokens == len(out.prefix[0])
    assert whole.usage.completion_tokens == sum(out.lengths)
    texts, ends = ["", "", ""], [None] * 3
    stream = client(server).chat.completions.create(
        **how, extra_body=extra, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert tuple(texts) == out.texts and tuple(ends) == out.finish
    assert usage == whole.usage


def test_without_a_seed_answers_differ_and_without_a_preference_all_count_alike(server):
    answers = {ask(server, temperature=3, preference=None).text for _ in range(3)}
    texts = {json.loads(a)["choices"][0]["message"]["content"] for a in answers}
    assert len(texts) > 1
    assert json.loads(answers.pop())["choices"][0]["preference"] == {"first": 0.5, "second": 0.5}


def test_several_preferences_are_one_request_with_one_prefill(server, run):
    five = [{"first": w / 4, "second": 1 - w / 4} for w in range(5)]
    said = ask(server, preference=None, preferences=five, n=1, max_tokens=6).json()
    assert [c["preference"] for c in said["choices"]] == five
    for choice, w in zip(said["choices"], five, strict=True):
        out = drawn(run, tuple(w.values()), Sampling(6, 0.0, seed=0))
        assert choice["message"]["content"] == out.texts[0]


def test_the_base_model_reads_no_preference(server, run):
    said = ask(server, model="base", max_tokens=6).json()
    out = drawn(run, None, Sampling(6, 0.0, seed=0), reference=True)
    assert said["choices"][0]["message"]["content"] == out.texts[0]
    assert said["choices"][0]["preference"] is None and said["model"] == "base"


def test_a_conversation_is_told_by_the_chat_template(server, run):
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    said = ask(server, messages=before + ASK, max_tokens=6).json()
    history = (("user", "Hello."), ("assistant", "Yes."))
    out = drawn(run, (0.8, 0.2), Sampling(6, 0.0, seed=0), history=history)
    assert said["choices"][0]["message"]["content"] == out.texts[0]
    assert said["usage"]["prompt_tokens"] == len(out.prefix[0])


def test_a_stop_ends_the_text_and_is_left_out(server):
    whole = ask(server, max_tokens=8).json()["choices"][0]["message"]["content"]
    stop = whole[3:5]
    for stream in (False, True):
        said = ask(server, max_tokens=8, stop=stop, stream=stream)
        if stream:
            events = [json.loads(e[6:]) for e in said.text.split("\n\n")[:-2]]
            text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
            end = events[-1]["choices"][0]["finish_reason"]
            assert said.text.endswith("data: [DONE]\n\n")
        else:
            (choice,) = said.json()["choices"]
            text, end = choice["message"]["content"], choice["finish_reason"]
        assert (text, end) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preference": {"first": 0.8}}, 'the objectives are {"first": …, "second": …}'),
        ({"preference": {"first": 0.8, "second": 0.8}}, "sums to 1.6"),
        ({"preference": {"first": -1, "second": 2}}, "first is negative"),
        ({"preference": {"first": "much", "second": 0}}, "must be numbers"),
        ({"preference": {"first": 0.8, "third": 0.2}}, "the objectives are"),
        ({"preference": [0.8, 0.2]}, "or 'auto'"),
        ({"preference": "auto"}, "no preference-weight-net"),
        ({"preferences": []}, "must be a list"),
        ({"preferences": [W]}, "give one of them"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": " "}]}, "not empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must be system, user or assistant"),
        ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, "must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": "hot"}, "must be a number"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens=1.5"),
        ({"max_tokens": 900000}, "exceed the model's context"),
        ({"n": 9}, "must be a whole number, 1 to 8"),
        ({"stop": ["a", ""]}, "none empty"),
        ({"seed": "x"}, "seed='x'"),
        ({"tools": [{}]}, "is not supported"),
        ({"temprature": 1}, "temprature: unknown"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_400_with_the_reason(server, changes, said, stream):
    answer = ask(server, stream=stream, **changes)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
    until(lambda: server.worker.outstanding == 0)


def test_bodies_that_are_no_requests(server):
    url = f"{server.url}/v1/chat/completions"
    assert "not JSON" in httpx.post(url, content=b"{").json()["error"]["message"]
    assert httpx.post(url, content=b"[]").status_code == 400
    assert httpx.post(url, content=b" " * (2 << 20)).status_code == 413
    with pytest.raises(openai.NotFoundError, match="there are 'tiny' and 'base'"):
        client(server).chat.completions.create(model="gpt-4", messages=ASK)
    assert httpx.get(f"{server.url}/docs").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models"])
def test_pages_of_other_sites_may_not_ask(server, headers, status, path):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    answer = httpx.get(server.url + path, headers=headers)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_token_is_asked_for_where_there_is_one(run):
    with serving(run.folder, token="open-sesame") as server:
        with pytest.raises(openai.AuthenticationError, match="token is missing or wrong"):
            client(server, "open-barley").models.list()
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert ask(server).status_code == 401
        assert client(server, "open-sesame").models.list().data[0].id == "tiny"
        assert httpx.get(server.url).status_code == 200  # the page holds nothing of the run


class Gate:
    """Lets the engine make steps only when it is told to."""

    def __init__(self, worker):
        self.steps = threading.Semaphore(0)
        step = worker._step

        def waits():
            self.steps.acquire()
            step()

        worker._step = waits


def endless(server):
    """So that no answer ends early: no token is an end."""
    server.served.policy.__class__ = type(
        "Endless", (server.served.policy.__class__,), {"stop_ids": frozenset()}
    )


def test_beyond_the_queue_it_is_429_and_who_goes_frees_the_slots(run):
    with serving(run.folder, slots=1, waiting=1) as server:
        endless(server)
        gate = Gate(server.worker)
        body = {"messages": ASK, "stream": True, "n": 2} | ENDLESS
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            assert stream.status_code == 200 and server.worker.outstanding == 2
            full = ask(server)
            assert full.status_code == 429 and full.headers["retry-after"] == "1"
            with pytest.raises(openai.RateLimitError):
                client(server).chat.completions.create(model="tiny", messages=ASK)
            gate.steps.release(2)
            next(stream.iter_lines())
        gate.steps.release(10)
        until(lambda: server.worker.outstanding == 0)
        steps = 1000
        gate.steps.release(steps)
        assert ask(server, max_tokens=4).status_code == 200


def test_a_client_that_hangs_up_on_a_whole_answer_frees_its_slot(run):
    with serving(run.folder, slots=1) as server:
        endless(server)
        gate = Gate(server.worker)
        with pytest.raises(httpx.ReadTimeout):
            body = {"messages": ASK} | ENDLESS
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
        until(lambda: (gate.steps.release(), server.worker.outstanding == 0)[1])


def test_who_goes_while_waiting_in_line_leaves_it(run):
    with serving(run.folder, slots=1, waiting=4) as server:
        endless(server)
        gate = Gate(server.worker)
        url = f"{server.url}/v1/chat/completions"
        body = {"messages": ASK, "stream": True} | ENDLESS
        with httpx.stream("POST", url, json=body, timeout=60):
            with pytest.raises(httpx.ReadTimeout):  # needs another network: not taken up
                httpx.post(url, json=body | {"model": "base"}, timeout=0.5)
            assert server.worker.outstanding == 2
            until(lambda: (gate.steps.release(), server.worker.outstanding == 1)[1])
        until(lambda: (gate.steps.release(), server.worker.outstanding == 0)[1])


def test_many_clients_at_once_each_get_their_own(server, run):
    wanted = {}
    for seed in range(12):
        wanted[seed] = drawn(run, (0.8, 0.2), Sampling(6, 1.0, seed=seed)).texts[0]
    found = {}

    def one(seed):
        while (answer := ask(server, seed=seed, temperature=1, max_tokens=6)).status_code == 429:
            pass
        found[seed] = answer.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
    until(lambda: server.worker.outstanding == 0)


def test_a_fault_of_the_engine_is_500_and_the_next_request_is_answered(run):
    with serving(run.folder) as server:
        step = server.worker._step

        def broken():
            server.worker._service.step = lambda: 1 / 0
            step()

        server.worker._step = broken
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client(server).chat.completions.create(model="tiny", messages=ASK)
        server.worker._step = step
        assert ask(server).status_code == 200


def test_rewards_are_the_run_s_objectives(server):
    answers = ["first first", "second"]
    url = f"{server.url}/v1/rewards"
    said = httpx.post(url, json={"prompt": ASK[0]["content"], "answers": answers}).json()
    from meal_fast.data.objectives import load_objectives

    config = server.served.config
    wanted = load_objectives(config.objectives).rewards([ASK[0]["content"]] * 2, answers).tolist()
    assert [list(r.values()) for r in said["rewards"]] == wanted
    assert list(said["rewards"][0]) == ["first", "second"]
    assert httpx.post(url, json={"prompt": "x", "answers": "y"}).status_code == 400
    assert httpx.post(url, json=[]).status_code == 400


def test_objectives_that_cannot_be_loaded_are_said(run):
    def ready(served):
        import dataclasses

        gone = ("first=no_such_module:f", "second=world:second")
        served.rewards._config = dataclasses.replace(served.config, objectives=gone)

    with serving(run.folder, ready=ready) as server:
        body = {"prompt": "x", "answers": ["y"]}
        answer = httpx.post(f"{server.url}/v1/rewards", json=body)
        assert answer.status_code == 503 and "cannot be loaded" in answer.json()["error"]["message"]
