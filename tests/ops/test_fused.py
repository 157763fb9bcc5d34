"""The policy loss whose terms the loss kernel makes inside the vocabulary sweep, against torch."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from meal_fast.kernels import policy_loss as kernels

from meal_fast import ops

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N, D, V = 11, 5, 37
F64 = torch.float64
SEQUENCE = torch.tensor([4, 4, 4, -1, -1, 9, 9, 9, 9, 2, 2])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Chunks of seven tokens and of four, each in blocks of four, of which not all are full."""
    monkeypatch.setattr(kernels, "BLOCK", 4)


def drawn(kl, beta, *, n=N, seed=0):
    """What every case has: hidden states, head and bias; targets, advantages and the rest."""
    torch.manual_seed(seed)
    leaves = [torch.randn(n, D), torch.randn(V, D), torch.randn(V)]
    advantage = torch.randn(n)
    advantage[::4] = 0
    given = {
        "target": torch.randint(0, V, (n,)),
        "advantage": advantage,
        "old_logp": -3.6 + torch.randn(n),
        "sequence": SEQUENCE[:n],
        "kl": kl,
        "beta": beta,
    }
    if kl == "exact" and beta:
        given["ref_hidden"] = torch.randn(n, D)
    elif kl != "exact":
        given["ref_logp"] = -3.6 + torch.randn(n)
    return leaves, given


def made(impl, leaves, given, device="cpu", trained=(True, True, True)):
    """loss, metrics, gradients (of -2.5 times the loss); torch: in float64."""
    dtype = F64 if impl == "torch" else torch.float32

    def moved(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    hidden, weight, bias = (
        moved(x).detach().clone().requires_grad_(t) for x, t in zip(leaves, trained, strict=True)
    )
    loss, metrics = ops.linear_policy_loss(
        hidden, weight, bias=bias, impl=impl, max_bytes=7 * V * 4 * (2 if impl == "torch" else 1),
        **{name: moved(x) for name, x in given.items()},
    )  # fmt: skip
    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
    gradients = torch.autograd.grad(-2.5 * loss, wanted) if wanted else ()
    return loss.detach(), metrics, gradients


def same(got, expected, tolerance=3e-5):
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False, "check_device": False}
    assert got[1].keys() == expected[1].keys()
    torch.testing.assert_close(got[0], expected[0], **close)
    for name, value in expected[1].items():
        torch.testing.assert_close(got[1][name], value, **close, msg=name)
    for mine, theirs in zip(got[2], expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kl", "reduce"), [("k1", "grpo"), ("k2", "dapo"), ("k3", "dr_grpo"), ("exact", "grpo")]
)
def test_every_kl_reduction_and_level(device, kl, beta, reduce, level):
    leaves, given = drawn(kl, beta)
    given |= {"reduce": reduce, "level": level, "mask": torch.arange(N) % 5 != 3}
    given["normalizer"] = {"grpo": None, "dapo": torch.tensor(7), "dr_grpo": 13.0}[reduce]
    same(made("triton", leaves, given, device), made("torch", leaves, given))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "change",
    [
        {"importance_weight": torch.rand(N)},
        {"old_logp": None},
        {"normalizer": None, "reduce": "dapo"},
        {"softcap": 2.0, "temperature": 0.6},
        {"clip": (0.0, 0.05)},
        {"mask": torch.zeros(N)},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_other_options(device, level, change, beta):
    leaves, given = drawn("k3", beta, seed=1)
    given |= {"level": level, "reduce": "grpo"} | change
    for trained in ((True, True, True), (True, False, False), (False, False, False)):
        same(
            made("triton", leaves, given, device, trained),
            made("torch", leaves, given, trained=trained),
        )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_tokens_may_hold_anything(device, level):
    leaves, given = drawn("k3", 0.3)
    out = torch.tensor([2, 3, 6])
    given |= {"level": level, "importance_weight": torch.rand(N)}
    given["mask"] = torch.ones(N, dtype=torch.bool)
    given["mask"][out] = False
    want = made("torch", leaves, given)
    for bad in (math.nan, math.inf):
        for name in ("advantage", "old_logp", "ref_logp", "importance_weight"):
            given[name][out] = bad
        leaves[0][out] = bad
        got = made("triton", leaves, given, device)
        same([got[0], got[1], got[2][1:]], [want[0], want[1], want[2][1:]])
        torch.testing.assert_close(got[2][0].cpu(), want[2][0].float(), rtol=3e-5, atol=3e-5)
        assert not got[2][0][out].any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduce", ["grpo", "dapo"])
def test_no_tokens(device, level, reduce):
    leaves, given = drawn("k3", 0.3, n=0)
    loss, metrics, gradients = made(
        "triton", leaves, given | {"level": level, "reduce": reduce}, device
    )
    assert loss == 0 and metrics["tokens"] == 0 and metrics["kl"] == 0
    assert gradients[0].shape == (0, D) and not any(g.any() for g in gradients)


def test_sequences_in_rows(device):
    """(B, T): a row is a sequence, and may have one advantage."""
    leaves, given = drawn("k3", 0.3, n=10)
    leaves[0] = leaves[0].view(2, 5, D)
    given = {name: x.view(2, 5) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    given["advantage"] = torch.tensor([0.7, -1.1])
    del given["sequence"]
    for level, reduce in itertools.product(("token", "sequence"), ("grpo", "dapo", "dr_grpo")):
        options = given | {"level": level, "reduce": reduce}
        same(made("triton", leaves, options, device), made("torch", leaves, options))


def test_two_runs_give_the_same_bits_and_other_chunks_the_same_loss(device):
    leaves, given = drawn("k3", 0.3)
    first, second = (made("triton", leaves, given, device) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, y) for x, y in zip(first[2], second[2], strict=True))
    hidden, weight, bias = (x.to(device) for x in leaves)
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    for max_bytes in (1, 3 * V * 4, None):
        loss, _ = ops.linear_policy_loss(
            hidden, weight, bias=bias, impl="triton", max_bytes=max_bytes, **given
        )
        torch.testing.assert_close(loss, first[0], rtol=1e-6, atol=1e-6)
