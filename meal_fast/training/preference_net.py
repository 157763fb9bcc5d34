"""The preference-weight-net of Meal: weights for each prompt. `net_trainer` is what teaches it.

    B  prompts    K  objectives    D  hidden width of the base model

The net reads a prompt through the frozen base model and gives the preference w⁰ that the policy is
asked for. What the responses realise is ŵ (`rollout.rejection_rules.ray_preference`); w*, between
the two, is what a response is trained under, and what the net is then drawn towards:

    prompt -> features -> PreferenceNet -> w⁰ -> rollout, rewards -> ŵ -> learned_preference -> w*

That a net maps prompts to weights, that these are updated as learnable parameters from the policy's
responses, and that the two levels are coupled is what Meta-Aligner states [P]; all formulas here
are our reading of it [R].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from meal_fast.common import opening, parse_json, require, write_atomic
from meal_fast.data_types import Prompt
from meal_fast.models import shared_prefix
from meal_fast.models.policy import Policy
from meal_fast.ops import checks

_METADATA = ("K", "names", "D", "hidden")


class PreferenceNet(nn.Module):
    """Give w⁰ = softmax(V tanh(U h + a) + b): one hidden layer, float32 [R].

    h is brought to mean 0 and variance 1 over its D entries first: hidden states differ in size
    from model to model by orders of magnitude, and the learning rate should not. The hidden layer
    is drawn from `seed` alone; constant, its units would stay equal for ever. The output layer is
    zero: w⁰ starts uniform for every prompt.

    Args:
        names: of the K objectives, two or more. width: D. hidden: units of the hidden layer.

    Raises:
        ValueError: fewer than two names, a size below 1.
    """

    def __init__(
        self, names: Sequence[str], width: int, hidden: int = 256, *, seed: int = 0
    ) -> None:
        super().__init__()
        require(len(names) >= 2, "names", tuple(names), "two objectives or more are needed")
        require(width >= 1, "width", width, "must be at least 1")
        require(hidden >= 1, "hidden", hidden, "must be at least 1")
        self.names, self.width, self.hidden = tuple(names), width, hidden
        # skip_init: nn.Linear would draw its values from the global generator.
        self.inner = skip_init(nn.Linear, width, hidden, dtype=torch.float32)
        self.outer = skip_init(nn.Linear, hidden, len(names), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.inner.weight.normal_(0.0, width**-0.5, generator=generator)
            for parameter in (self.inner.bias, self.outer.weight, self.outer.bias):
                parameter.zero_()

    def forward(self, h_BD: Tensor) -> Tensor:
        """Map h (B, D), a constant, to w⁰ (B, K) on the simplex, not floored."""
        checks.shape("h_BD", h_BD, (len(h_BD), self.width))
        h_BD = F.layer_norm(h_BD.detach().to(self.inner.weight.dtype), (self.width,))
        return torch.softmax(self.outer(torch.tanh(self.inner(h_BD))), -1)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all; K, names, D and hidden with it."""
        values = (len(self.names), self.names, self.width, self.hidden)
        metadata = {n: json.dumps(v) for n, v in zip(_METADATA, values, strict=True)}
        state = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomic(path, save(state, metadata))

    @staticmethod
    def load(path: Path, names: Sequence[str]) -> PreferenceNet:
        """Read the net of `path`, onto the CPU, for the objectives `names`.

        Raises ValueError for a file that is none, or of another number, order or names of
        objectives.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"preference net {str(path)!r}: cannot be read ({error})") from None
        if set(_METADATA) - set(metadata):
            raise ValueError(f"preference net {str(path)!r}: is no file of PreferenceNet.save")
        with opening(f"preference net {str(path)!r}"):
            k, held, width, hidden = (parse_json(metadata[name]) for name in _METADATA)
            said, found = (hidden, width), tuple(state["inner.weight"].shape)
            if said != found:  # before memory is taken for what is said
                raise ValueError(f"it says {said}, and is of {found}")
        if tuple(held) != tuple(names):
            raise ValueError(
                f"preference net {str(path)!r}: is for K={k} objectives {', '.join(held)}; "
                f"given K={len(names)}, {', '.join(names)}; use the objectives of its run"
            )
        net = PreferenceNet(held, width, hidden)
        with opening(f"preference net {str(path)!r}"):
            net.load_state_dict(state)
        return net


@torch.no_grad()
def features(policy: Policy, prompts: Sequence[Prompt], micro_tokens: int = 4096) -> Tensor:
    """Give h (B, D) float32: the frozen base model's last hidden states, averaged over the prompt.

    What is read is `policy.encode_prompt(text)`: template, system line and the user's text, without
    any preference. The mean is over the user's tokens [R]: those before them have the same states
    for every prompt, and would drown the rest (cosine between prompts of SmolLM2-135M: 0.97 with
    them, 0.79 without). Prompts of like length go through the model together, by `micro_tokens`.

    Raises ValueError when there are no prompts.
    """
    require(len(prompts) >= 1, "prompts", prompts, "nothing to read")
    rows = [policy.encode_prompt(prompt.text) for prompt in prompts]
    starts = [_start(row, policy.encode_prompt("")) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out: dict[int, Tensor] = {}
    with policy.reference() as base:
        while order:
            # As many as fit when padded to the longest; by length, so that these are the first.
            fits = [n * len(rows[i]) <= micro_tokens for n, i in enumerate(order, 1)]
            at, order = order[: max(1, sum(fits))], order[max(1, sum(fits)) :]
            none = torch.zeros(0, 1, dtype=torch.int64, device=policy.device)
            batch = shared_prefix.pack([rows[i] for i in at], (), (), none)
            hidden_ND = shared_prefix.forward(base.body, batch).float()
            start_B = torch.tensor([starts[i] for i in at], device=policy.device)
            read_N = batch.positions_1N[0] >= start_B[batch.group_N]
            length_B1 = torch.tensor([[len(rows[i]) - starts[i]] for i in at], device=policy.device)
            b, p, _, _ = batch.shape_BPRS
            hidden_XD = hidden_ND.new_zeros(b * p, hidden_ND.shape[1]).index_copy_(
                0, batch.place_N, torch.where(read_N[:, None], hidden_ND, 0.0)
            )
            mean_BD = hidden_XD.view(b, p, -1).sum(1) / length_B1
            out |= zip(at, mean_BD, strict=True)
    return torch.stack([out[i] for i in range(len(rows))])


def _start(row: Sequence[int], template: Sequence[int]) -> int:
    """Count a prompt's tokens that are the template's; 0 where it holds nothing else."""
    same = [a == b for a, b in zip(row, template, strict=False)]
    start = (*same, False).index(False)
    return start if start < len(row) else 0


class Features:
    """Keep `features` by prompt id, since the base model is frozen: of the `room` last in use.

    It belongs to a run's checkpoint: read again beside other prompts, a row's last bits may differ.
    """

    def __init__(self, policy: Policy, room: int = 4096) -> None:
        require(room >= 1, "room", room, "must be at least 1")
        self.policy, self.room = policy, room
        self._kept: dict[str, Tensor] = {}  # the longest out of use first

    def __call__(self, prompts: Sequence[Prompt]) -> Tensor:
        """Give (B, D) float32 on the policy's device."""
        require(len(prompts) >= 1, "prompts", prompts, "nothing to read")
        new = list({p.id: p for p in prompts if p.id not in self._kept}.values())
        if new:
            read = features(self.policy, new)
            self._kept |= {p.id: h.clone() for p, h in zip(new, read, strict=True)}
        for prompt in prompts:
            self._kept[prompt.id] = self._kept.pop(prompt.id)
        out = torch.stack([self._kept[prompt.id] for prompt in prompts])
        shorten(self._kept, self.room)
        return out

    def state(self) -> dict[str, Any]:
        """Give what was kept, copied."""
        return {"ids": list(self._kept), "h": [h.clone() for h in self._kept.values()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        device = self.policy.device
        self._kept = {i: h.to(device) for i, h in zip(state["ids"], state["h"], strict=True)}


def shorten(kept: dict[str, Any], room: int) -> None:
    """Drop the oldest entries beyond `room`."""
    for name in list(kept)[: max(0, len(kept) - room)]:
        del kept[name]
