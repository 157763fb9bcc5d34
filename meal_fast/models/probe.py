"""A check of every policy at load: our passes give what transformers' own model gives, or it is
refused.

`shared_prefix` puts an attention function of ours into a model, and hands it `tree=` by way of the
model's own code. A model that does not hand it on, asks for more than causal softmax attention, or
keeps something between tokens beside keys and values would answer all the same, and wrongly. So a
few tokens go through the model three ways, in float32 whatever the policy's dtype is:

    plain     transformers' own attention, every row by itself
    packed    two rows behind one prefix, and a row far off, in one sequence: a learner's pass
    cached    prompts, then suffixes, then single tokens: a sampler's passes

What a few tokens cannot show is asked for: the mask that the model would make at its full context,
what it says to its attention function, how many positions its tables hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from meal_fast.common import first_line

from . import shared_prefix
from .network import Network
from .policies.base import Policy
from .policies.full import FullPolicy
from .shared_prefix import Refused
from .watched import WATCHED

NEAR = 1e-3  # nats: how far log-probabilities may be apart
INSTEAD = "use a model with plain causal attention in every layer (Llama, Qwen2, Qwen3, …)"
_PREFIX, _ROWS, _FAR = 5, (4, 3), (3, 2)  # tokens: a prefix, rows behind it, a prefix and a row
_FAR_OFF = 4096  # where a model's context is not known


@torch.no_grad()
def probe(policy: Policy, path: str) -> None:
    """Check `policy`, loaded from `path`; lower its context to what its position tables hold.

    Adapters are off, all random state stays as it is, and of the weights no copy is made but, in
    half precision, of one module's at a time. Raises ValueError, one line naming the model, where
    log-probabilities are more than `NEAR` apart, or the model needs what our passes do not give.
    """
    if policy.sharded is not None:
        raise ValueError("policy: its weights are held in parts; probe it before that")
    reference = nullcontext(policy.network) if isinstance(policy, FullPolicy) else None
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(_exact())
            network = stack.enter_context(reference or policy.reference())
            model = policy.causal_lm
            stack.enter_context(_in_float32(model))
            _probe(policy, model, network)
    except Exception as error:  # whatever somebody's code may raise
        name = getattr(policy.causal_lm.config, "model_type", type(policy.causal_lm).__name__)
        raise ValueError(f"policy.path={path!r}: {name} {_why(error)}; {INSTEAD}") from error


def _why(error: Exception) -> str:
    if isinstance(error, Refused):
        return str(error)
    return f"cannot run as our passes need it ({first_line(error)})"


def _probe(policy: Policy, model: Any, network: Network) -> None:
    ids = _tokens(policy, network, _PREFIX + sum(_ROWS) + sum(_FAR))
    prefix, *rows, apart, behind = _split(ids, [_PREFIX, *_ROWS, *_FAR])
    weight = network.weight.float()
    bias = None if network.bias is None else network.bias.float()
    wide = replace(network, weight=weight, bias=bias)

    def said(states: Tensor) -> Tensor:
        return wide.logits(states.float()).log_softmax(-1)

    with _attending(model, "eager"):
        with _Tables() as tables:
            plain = [_plain(model, [*prefix, *row]) for row in rows]
        policy.context = min([policy.context, *tables.rooms(_PREFIX + _ROWS[0])])
        known = policy.context < 1 << 30
        start = max((policy.context if known else _FAR_OFF) - sum(_FAR), 0)
        far = _plain(model, [*apart, *behind], start)
    if not all(bool(x.isfinite().all()) for x in (*plain, far)):
        raise Refused("gives log-probabilities that are not finite")

    # What transformers' whole model says, against body and head taken apart.
    ends = [(row, _PREFIX) for row in plain] + [(far, _FAR[0])]
    wanted = torch.cat([x[n - 1 : -1] for x, n in ends])
    packed = _packed(prefix, rows, apart, behind, start, network.weight.device)
    got = said(packed.predicting(shared_prefix.forward(network.body, packed)))
    _compare(got, wanted, "in a packed pass")

    # Two rows of other lengths through prompts, suffixes and one token each.
    whole = [[*prefix, *row] for row in rows]
    cuts = [(5, 8, 9), (4, 6, 7)]
    passes = _Rows(len(whole), network.kv_shape)
    with _attending(model, WATCHED):
        for low, high in ((None, 0), (0, 1), (1, 2)):
            begin = [0 if low is None else cut[low] for cut in cuts]
            texts = [row[b : cut[high]] for row, b, cut in zip(whole, begin, cuts, strict=True)]
            states = passes.run(network.body, texts, None if low is None else begin)
            for r, (text, b) in enumerate(zip(texts, begin, strict=True)):
                got, wanted = said(states[r, : len(text)]), plain[r][b : b + len(text)]
                _compare(got, wanted, "with keys and values kept")


def _compare(got: Tensor, wanted: Tensor, where: str) -> None:
    apart = float((got - wanted).abs().max())
    if not apart <= NEAR:  # NaN too
        raise Refused(
            f"computes more than our attention and a linear head give: {where}, log-probabilities "
            f"are {apart:.2g} nats from transformers' own"
        )


def _tokens(policy: Policy, network: Network, count: int) -> list[int]:
    """Ordinary ones, spread over the vocabulary, no two alike where it has so many."""
    size = min(len(policy.tokenizer), len(network.weight))
    special = set(policy.tokenizer.all_special_ids)
    spread = dict.fromkeys(n * 7919 % size for n in range(1, 4 * count + len(special)))
    ids = [i for i in spread if i not in special] or [0]
    return (ids * count)[:count]


def _split(ids: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(list(ids[start : start + length]))
        start += length
    return parts


def _plain(model: Any, tokens: list[int], start: int = 0) -> Tensor:
    """Log-probabilities (T, V) of transformers' model, the first token at position `start`."""
    device = model.get_output_embeddings().weight.device
    ids = torch.tensor([tokens], device=device)
    positions = torch.arange(start, start + len(tokens), device=device)[None]
    where = {"position_ids": positions} if start else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **where).logits
    return logits[0].float().log_softmax(-1)


def _packed(
    prefix: list[int],
    rows: list[list[int]],
    apart: list[int],
    behind: list[int],
    start: int,
    device: torch.device,
) -> shared_prefix.Packed:
    """Pack two rows behind `prefix`, and one behind `apart`, whose positions begin at `start`."""
    tokens_RT, _ = shared_prefix.pad([*rows, behind], device)
    lengths = [*map(len, rows), len(behind)]
    packed = shared_prefix.pack([prefix, apart], [0] * len(rows) + [1], lengths, tokens_RT)
    return replace(packed, positions_1N=packed.positions_1N + start * packed.group_N)


@dataclass
class _Rows:
    """A `Pass` of rows that each have keys and values of their own, and go on behind them."""

    rows: int
    kv_shape: tuple[int, int, int]
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    valid_RP: Tensor | None = None  # of those that are kept
    done: list[int] = field(default_factory=list)  # layers, in this pass
    task_id: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))

    def run(self, body: Any, texts: list[list[int]], begin: list[int] | None) -> Tensor:
        """Run the rows' next tokens, at positions from `begin` on; none: as the model counts."""
        device = next(body.parameters()).device
        tokens_RT, valid_RT = shared_prefix.pad(texts, device)
        where = {}
        if begin is not None:
            steps = torch.arange(tokens_RT.shape[1], device=device)
            where["position_ids"] = torch.tensor(begin, device=device)[:, None] + steps
        self.done.clear()
        self.task_id = self.task_id.to(device)
        states: Tensor = body(
            input_ids=tokens_RT, use_cache=False, tree=self, **where
        ).last_hidden_state
        if sorted(self.done) != list(range(self.kv_shape[0])):
            raise Refused(
                f"runs attention in layers {sorted(self.done)}, not once in each of "
                f"{self.kv_shape[0]}"
            )
        before = [] if self.valid_RP is None else [self.valid_RP]
        self.valid_RP = torch.cat([*before, valid_RT], 1)
        return states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend to what is kept of each row, and causally: `Pass`."""
        self.done.append(layer)
        for x in (key, value):
            if (x.shape[1], x.shape[3]) != self.kv_shape[1:]:
                raise Refused(
                    f"has {x.shape[1]} heads of {x.shape[3]} numbers for keys or values where its "
                    f"configuration says {self.kv_shape[1]} of {self.kv_shape[2]}"
                )
        if self.valid_RP is None:
            out = shared_prefix.causal(query, key, value, scale)
            self.kept[layer] = (key, value)
        else:
            own = torch.arange(self.rows, device=query.device)
            kept = self.kept[layer]
            out = shared_prefix.behind(query, key, value, *kept, own, self.valid_RP, scale)
            pairs = zip(kept, (key, value), strict=True)
            self.kept[layer] = tuple(torch.cat(pair, 2) for pair in pairs)  # type: ignore[assignment]
        return out.transpose(1, 2)


class _Tables(TorchFunctionMode):
    """Notes which embeddings are looked up by position, and how many positions they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.embedding:
            ids, table = (*args, *(kwargs or {}).values())[:2]
            self.looked_up.append((ids.detach(), len(table)))
        return func(*args, **(kwargs or {}))

    def rooms(self, tokens: int) -> Iterator[int]:
        """Give the positions that each table holds, by its look-ups for that many tokens."""
        for ids, size in self.looked_up:
            flat = ids.reshape(-1).tolist()
            if len(flat) == tokens and flat == list(range(flat[0], flat[0] + tokens)):
                yield size - flat[0]


@contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 in float32: for as long as it lasts, none in TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@contextmanager
def _attending(model: Any, name: str) -> Iterator[None]:
    """Switch the attention function of every module; nothing else of the model is touched."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    kept = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in kept:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, before in kept:
            config._attn_implementation_internal = before


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Run a model of half precision with its weights in float32, one module's at a time."""
    held: list[tuple[list[nn.Parameter], list[Tensor]]] = []

    def widen(module: nn.Module, *_: Any) -> None:
        own = [p for p in module.parameters(recurse=False) if p.dtype in _HALF]
        held.append((own, [p.data for p in own]))
        for p in own:
            p.data = p.data.float()

    def narrow(*_: Any) -> None:
        for p, data in zip(*held.pop(), strict=True):
            p.data = data

    hooks = []
    for module in model.modules():
        if any(p.dtype in _HALF for p in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(narrow, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_HALF = (torch.bfloat16, torch.float16)
