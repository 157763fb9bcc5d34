"""What the tests of the sampler's three forms share: the rule for two tokens that differ."""

import torch

from meal_fast.ops import philox

# By how much of the total mass the float32 exponentials of two forms may move a running sum.
ROUNDING = 2e-6
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.8, "temperature": 1.4},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
]
# Logits, options, and the tokens kept: of equal logits those with the lowest ids, and no more than
# there is room for.
TIES = [
    ([0.0] * 600, {"top_k": 3}, {0, 1, 2}),
    ([0.0] * 200, {"top_p": 0.01}, {0, 1}),
    ([0.0] * 200, {"top_p": 0.0101}, {0, 1, 2}),
    ([0.0, -0.0, 0.0, -1.0], {"top_k": 2}, {0, 1}),
    ([3.0, 1.0, 2.0, 2.0], {"top_k": 2}, {0, 2}),
    ([2.0, 2.0, 2.0, 1.0], {"top_k": 3, "top_p": 0.5}, {0, 1}),
    ([1.0, 2.0, 2.0, 2.0], {"top_k": 2, "top_p": 0.999}, {1, 2}),
    ([0.0, -9.0, 0.0], {"min_p": 1.0}, {0, 2}),
    ([-float("inf"), 0.0, -float("inf")], {"top_k": 3}, {1}),
    ([0.0, 1.0], {"top_p": 1e-12}, {1}),
    # neighbours among the float32 numbers are no ties
    ([1 + 2**-23, 1.0, 1 + 3 * 2**-23, 1 + 2**-22], {"top_k": 1}, {2}),
    ([-1 - 2**-23, -1.0, -1 - 3 * 2**-23, -1 - 2**-22], {"top_k": 2}, {0, 1}),
]


def at_a_boundary(logits, u, first, second, options):
    """Whether the uniform lies within ROUNDING of all that parts two tokens of a row."""
    z = logits.double() / options.get("temperature", 1.0)
    p = z.softmax(0)
    order = z.sort(descending=True, stable=True).indices
    keep = torch.ones_like(p)
    if options.get("top_k"):
        keep[order[options["top_k"] :]] = 0
    if options.get("top_p", 1.0) < 1:
        left = (p * keep)[order]
        keep[order[left.cumsum(0) - left >= options["top_p"] * left.sum()]] = 0
    keep[p < options.get("min_p", 0.0) * p.max()] = 0
    running = (p * keep).cumsum(0) / (p * keep).sum()
    low, high = min(first, second), max(first, second)
    return bool(((running[low:high] - u).abs() < ROUNDING).all())


def agree(logits, plain, other, seed, row, position, options):
    """Tokens are equal unless the uniform lies on a boundary; log-probabilities are near."""
    u = philox.uniform(seed, row, position)
    for i in (plain[0] != other[0]).nonzero().flatten().tolist():
        assert options.get("temperature", 1.0) > 0
        first, second = int(plain[0][i]), int(other[0][i])
        assert at_a_boundary(logits[i], float(u[i]), first, second, options), (i, first, second)
    same = plain[0] == other[0]
    for a, b in zip(plain[1:], other[1:], strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a[same], b[same], rtol=1e-5, atol=2e-6)


def keeps(logits, drawn, kept):
    """Of draws of one row: truncated log-probabilities tell how much was kept; tokens, what."""
    token, logp, truncated = drawn
    assert set(token.tolist()) <= kept
    if len(token) >= 100:
        assert set(token.tolist()) == kept
    mass = logits.softmax(0)[sorted(kept)].sum().log().expand(len(token))
    torch.testing.assert_close(truncated - logp, -mass, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logp, logits.log_softmax(0)[token], rtol=1e-5, atol=2e-6)
