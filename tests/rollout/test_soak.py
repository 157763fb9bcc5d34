"""Ten thousand rows through a few slots: none lost, none doubled, and memory stays where it was."""

import gc
from collections import Counter
from pathlib import Path

import pytest

from meal_fast.rollout import Engine, Request, Sampling
from tests.helpers.models import NumberPolicy
from tests.rollout.test_engine import prompt

ROWS, PROMPTS = 10_000, 250


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    pytest.skip("no /proc here")


@pytest.mark.slow
def test_ten_thousand_rows_of_random_lengths():
    policy = NumberPolicy("llama", stop=frozenset(range(20)))
    requests = [
        Request(
            prompt([21 + i % 70, *[40 + i % 50] * (i % 13), 1 + i % 19]), w, ROWS // PROMPTS // 2
        )
        for i in range(PROMPTS)
        for w in ((0.2, 0.8), (0.9, 0.1))
    ]
    token = Engine(policy, policy.network).shape.token_bytes
    # a cache for a few dozen of the prompts: the rest is evicted and computed again
    sampler = Engine(policy, policy.network, max_rows=64, max_cache_bytes=64 * 96 * token)
    rows = sampler.rows(requests, 12)
    seen: Counter[int] = Counter()
    memory = []
    for step, ended in enumerate(sampler.draw(rows, Sampling(12, 1.0, 7))):
        seen.update(map(id, ended))
        if step % 100 == 50:
            gc.collect()
            memory.append(resident())
    assert len(rows) == len(seen) == ROWS and set(seen.values()) == {1}
    assert all(row.finish in ("stop", "length") and len(row.tokens) <= 12 for row in rows)
    assert len(Counter(len(row.tokens) for row in rows)) == 12, "rows of every length"
    assert sampler.counts.decode == sum(len(row.tokens) - 1 for row in rows)
    assert len(memory) >= 4
    assert max(memory) - memory[0] < 16 << 20, [m >> 20 for m in memory]
