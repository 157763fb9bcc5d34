"""Serving: first token, five preferences at once, requests a second by number of clients.

    python -m bench.serve RUN --rounds 2

Two servers of one run in processes of their own, alternating: `together`, whose rows share the
engine's slots, and `in turn`, with one slot, which answers one request after the other. The rows
go to bench/results/cpu.jsonl.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from bench import rows
from meal_fast.config.run_dir import read_config

HERE = Path(__file__).resolve().parent
SLOTS = {"together": 16, "in turn": 1}
CLIENTS = (1, 8, 32)
PLACES = ("a river", "a small town", "the sea", "a library", "a market", "an old bridge", "a farm")


@contextlib.contextmanager
def server(run: Path, slots: int, threads: int) -> Iterator[str]:
    """Starts it; the address that it says."""
    command = [sys.executable, "-m", "meal_fast.serve", str(run), "--port", "0"]
    command += ["--slots", str(slots), "--queue", "200"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        yield next(m[1] for line in lines if (m := re.search(r"playground at (\S+)/,", line)))
    finally:
        process.terminate()
        process.communicate()


class Load:
    """Requests to one server; no two have the same prompt, so none finds another's prefill."""

    def __init__(self, url: str, names: tuple[str, ...], tokens: int) -> None:
        self.url, self.names, self.tokens = f"{url}/v1/chat/completions", names, tokens
        self._number, self._lock = 0, threading.Lock()

    def body(self, **changes: Any) -> dict[str, Any]:
        with self._lock:
            self._number += 1
            n = self._number
        text = f"Question {n}: what would you take along to {PLACES[n % len(PLACES)]}, and why?"
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": self.tokens}
        return asked | {"temperature": 0.9, "preference": self.w(n % 5 / 4)} | changes

    def w(self, share: float) -> dict[str, float]:
        others = len(self.names) - 1
        values = [1 - share] + [share / others] * others
        return dict(zip(self.names, values, strict=True))

    def ask(self, client: httpx.Client, **changes: Any) -> int:
        """The number of tokens sampled."""
        answer = client.post(self.url, json=self.body(**changes), timeout=600)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    def first_token(self, client: httpx.Client) -> float:
        started = time.perf_counter()
        body = self.body(stream=True)
        with client.stream("POST", self.url, json=body, timeout=600) as stream:
            for line in stream.iter_lines():
                if '"delta":{"content"' in line:
                    return time.perf_counter() - started
        raise RuntimeError("an answer without a token")

    def five(self, client: httpx.Client) -> float:
        weights = [self.w(n / 4) for n in range(5)]
        started = time.perf_counter()
        self.ask(client, preference=None, preferences=weights)
        return time.perf_counter() - started

    def clients(self, count: int, requests: int) -> tuple[float, float]:
        """Requests and tokens a second, of `count` clients that ask one after the other."""
        left, sampled = [requests], [0]

        def one() -> None:
            with httpx.Client() as client:
                while True:
                    with self._lock:
                        if not left[0]:
                            return
                        left[0] -= 1
                    tokens = self.ask(client)
                    with self._lock:
                        sampled[0] += tokens

        threads = [threading.Thread(target=one) for _ in range(count)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        return requests / seconds, sampled[0] / seconds


def measured(run: Path, side: str, threads: int, tokens: int) -> dict[str, Any]:
    names = read_config(run).names
    with server(run, SLOTS[side], threads) as url, httpx.Client() as client:
        load = Load(url, names, tokens)
        load.ask(client)  # warm
        found: dict[str, Any] = {
            "first_token_seconds": [load.first_token(client) for _ in range(2)],
            "five_seconds": [load.five(client)],
        }
        for count in CLIENTS:
            found[f"clients_{count}"] = [load.clients(count, max(4, count))]
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    pooled = {name: [x for one in rounds for x in one[name]] for name in rounds[0]}
    out: dict[str, Any] = {}
    for name, values in pooled.items():
        if name.startswith("clients"):
            out[f"{name}_requests_per_second"] = statistics.median(v[0] for v in values)
            out[f"{name}_tokens_per_second"] = statistics.median(v[1] for v in values)
        else:
            out[name] = statistics.median(values)
    return {name: round(value, 3) for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side: A B A B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24, help="the longest answer")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    before = rows.machine()
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SLOTS}
    for number in range(args.rounds):
        for side in SLOTS:
            rounds[side].append(measured(args.run, side, args.threads, args.tokens))
            print(f"round {number + 1}, {side}: {summary(rounds[side][-1:])}", flush=True)
    sides = {side: summary(found) for side, found in rounds.items()}
    ratios = {
        str(n): round(
            sides["together"][f"clients_{n}_requests_per_second"]
            / sides["in turn"][f"clients_{n}_requests_per_second"],
            2,
        )
        for n in CLIENTS
    }
    row = {
        "bench": "serve",
        "commit": rows.commit(),
        "date": rows.now(),
        "command": f"python -m bench.serve RUN --rounds {args.rounds} --tokens {args.tokens}",
        "machine": before,
        "threads": args.threads,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "versions": rows.versions("torch", "transformers", "fastapi", "uvicorn"),
        "sides": sides,
        "requests_together_to_in_turn": ratios,
    }
    rows.append(args.results, [row])
    print(row)


if __name__ == "__main__":
    main()
