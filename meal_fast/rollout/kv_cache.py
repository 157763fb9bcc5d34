"""Keys and values of the sampler: every prefix once, and a tail of its own for every row.

A `Pool` has places of equal size, one for each prompt; another pool has those of the preference
suffixes, each computed behind its prompt. `Tails` has a slot for each row that is being decoded: a
copy of its suffix (short) and its sampled tokens. What fills them are three kinds of forward pass,
which are what the model's attention function is handed:

    PromptPass   whole prompts, causally, into places of a pool
    SuffixPass   suffixes behind their prompts' places, into places of another pool
    TokenPass    one new token a row: grouped products with the prompt's single copy, and the tail

All sizes are fixed when the memory is made, and its bytes are known before.
"""

from __future__ import annotations

from collections.abc import Collection, KeysView, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.models.policy import Network
from meal_fast.models.shared_prefix import behind, causal, pad
from meal_fast.ops import Groups

from .sequence import Prefix, Tokens


@dataclass(frozen=True)
class Shape:
    """What the keys and values of one token take."""

    layers: int
    heads: int  # of keys and values: H
    width: int  # of a head: d
    hidden: int  # D
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(network: Network) -> Shape:
        (layers, heads, width), weight = network.kv_shape, network.weight
        return Shape(layers, heads, width, weight.shape[1], weight.dtype, weight.device)

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize

    def memory(self, places: int, room: int) -> tuple[list[Tensor], list[Any]]:
        """Make keys and values of every layer, (places, H, room, d) each, zero: as blocks that are
        copied at once, (…, places, H, room, d), and as each layer's pair.

        Zero, since what lies behind a prefix's end meets a probability of 0 in a product, and
        0 times what was in the memory before may be NaN. On a GPU all are one block.
        """
        size = (places, self.heads, room, self.width)
        if self.device.type != "cpu":
            whole = torch.zeros(self.layers, 2, *size, dtype=self.dtype, device=self.device)
            return [whole], list(whole)
        # numpy's zeros are pages that the system gives when they are first written; to one array of
        # all layers it gives them more slowly.
        bits = np.dtype(f"i{self.dtype.itemsize}")
        blocks = [
            torch.from_numpy(np.zeros(size, bits)).view(self.dtype) for _ in range(2 * self.layers)
        ]
        return blocks, list(zip(blocks[::2], blocks[1::2], strict=True))


class Pool:
    """Places for the keys and values of prefixes, and each one's last hidden state.

    When all places are taken, the one longest out of use is given to another prefix.
    """

    def __init__(self, shape: Shape, places: int, room: int) -> None:
        self.shape, self.places, self.room = shape, places, room
        self.blocks, self.layers = shape.memory(places, room)
        self.hidden_BD = torch.zeros(places, shape.hidden, dtype=shape.dtype, device=shape.device)
        self.length = [0] * places
        self.length_B = torch.zeros(places, dtype=torch.int64, device=shape.device)
        self.adapter_B = torch.zeros_like(self.length_B)
        self._place: dict[object, int] = {}  # the longest out of use first
        self.clear()

    def clear(self) -> None:
        """Forget all prefixes."""
        self._place.clear()
        self._free = list(range(self.places))[::-1]

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    @property
    def keys(self) -> KeysView[object]:
        return self._place.keys()

    def find(self, key: object) -> int | None:
        """Find the place of `key`, from now on the last in use."""
        place = self._place.pop(key, None)
        if place is not None:
            self._place[key] = place
        return place

    def take(self, key: object, pinned: Collection[int]) -> int | None:
        """Take a place for `key`, to be filled; None if all are pinned."""
        if self._free:
            place = self._free.pop()
        else:
            oldest = next((k for k, p in self._place.items() if p not in pinned), None)
            if oldest is None:
                return None
            place = self._place.pop(oldest)
        self._place[key] = place
        return place

    def fill(
        self,
        place_B: Tensor,
        places: Sequence[int],
        texts: Sequence[Tokens],
        valid_BT: Tensor,
        hidden: Tensor,
    ) -> None:
        """Note what is known of prefixes after their pass: lengths, and last hidden states."""
        length_B = valid_BT.sum(1)
        self.length_B[place_B] = length_B
        for place, text in zip(places, texts, strict=True):
            self.length[place] = len(text)
        at = torch.arange(len(places), device=hidden.device)
        self.hidden_BD[place_B] = hidden[at, length_B - 1]

    def drop(self, key: object) -> None:
        """Forget `key`: its place was taken, and could not be filled."""
        self._free.append(self._place.pop(key))

    def resized(self, places: int, room: int) -> Pool:
        """Make a pool that is no smaller, and holds what this one holds."""
        if (places, room) == (self.places, self.room):
            return self
        new = Pool(self.shape, places, room)
        for fresh, old in zip(new.blocks, self.blocks, strict=True):
            fresh[..., : self.places, :, : self.room, :] = old
        new.hidden_BD[: self.places] = self.hidden_BD
        new.length[: self.places] = self.length
        new.length_B[: self.places] = self.length_B
        new.adapter_B[: self.places] = self.adapter_B
        new._place = dict(self._place)
        new._free = [*range(self.places, places)][::-1] + self._free
        return new


class Tails:
    """A slot for each row that is being decoded: its suffix, and its sampled tokens."""

    def __init__(self, shape: Shape, places: int, room: int) -> None:
        self.places, self.room = places, room
        self.blocks, self.layers = shape.memory(places, room)
        self._device = shape.device

    def begin(self, slots: Sequence[int], suffixes: Pool, places: Sequence[int]) -> None:
        """Copy suffixes to the slots of the rows that start behind them."""
        length = max(suffixes.length[place] for place in places)
        slot_R, place_R = self._at(slots), self._at(places)
        for tail, suffix in zip(self.blocks, suffixes.blocks, strict=True):
            tail[..., slot_R, :, :length, :] = suffix[..., place_R, :, :length, :]

    def move(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy slots, `length` tokens of each."""
        source_M, target_M = self._at(source), self._at(target)
        for tail in self.blocks:
            tail[..., target_M, :, :length, :] = tail[..., source_M, :, :length, :]

    def _at(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, device=self._device)


@dataclass(frozen=True)
class PromptPass:
    """Prompts (B, P), padded on the right, into places of a pool."""

    pool: Pool
    place_B: Tensor

    @property
    def task_id(self) -> Tensor:
        return self.pool.adapter_B[self.place_B, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.pool.layers[layer]
        keys[self.place_B, :, : key.shape[2]] = key
        values[self.place_B, :, : key.shape[2]] = value
        return causal(query, key, value, scale).transpose(1, 2)


@dataclass(frozen=True)
class SuffixPass:
    """Suffixes (B, S), padded on the right, behind prompts, into places of another pool."""

    prompts: Pool
    prompt_B: Tensor
    valid_BP: Tensor
    pool: Pool
    place_B: Tensor

    @property
    def task_id(self) -> Tensor:
        return self.prompts.adapter_B[self.prompt_B, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.pool.layers[layer]
        keys[self.place_B, :, : key.shape[2]] = key
        values[self.place_B, :, : key.shape[2]] = value
        width = self.valid_BP.shape[1]
        pk, pv = (x[:, :, :width] for x in self.prompts.layers[layer])
        out = behind(query, key, value, pk, pv, self.prompt_B, self.valid_BP, scale)
        return out.transpose(1, 2)


@dataclass(frozen=True)
class TokenPass:
    """The next token of the rows in the first R slots."""

    prompts: Pool
    low: int  # the rows' prompts lie in places low to high, none longer than `width`
    high: int
    width: int
    groups: Groups  # of the rows, by place - low
    tails: Tails
    slots_R: Tensor  # 0, 1, …, R - 1
    at_R: Tensor  # where the token goes in each tail
    at: int | None  # the same, where it is the same for all rows
    seen_R: Tensor  # at_R + 1
    longest: int

    @property
    def task_id(self) -> Tensor:
        return self.prompts.adapter_B[self.low + self.groups.group_R, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        r = len(self.at_R)
        pairs = zip(self.tails.layers[layer], (key, value), strict=True)
        for tail, new in pairs:
            if self.at is not None:
                tail[:r, :, self.at] = new[:, :, 0]
            else:
                tail[self.slots_R, :, self.at_R] = new[:, :, 0]
        pk, pv = (x[self.low : self.high, :, : self.width] for x in self.prompts.layers[layer])
        tk, tv = (x[:r, :, : self.longest] for x in self.tails.layers[layer])
        lengths = self.prompts.length_B[self.low : self.high]
        out = ops.prefix_attention(
            query[:, :, 0], pk, pv, lengths, self.groups, tk, tv, self.seen_R, scale=scale
        )
        return out[:, None]


def fill_prompts(
    network: Network, pool: Pool, prompts: Sequence[Prefix], places: Sequence[int]
) -> int:
    """Run prompts through the model into their places; the number of their tokens."""
    device = pool.shape.device
    adapters, texts = zip(*prompts, strict=True)
    tokens_BP, valid_BP = pad(texts, device)
    place_B = torch.tensor(places, device=device)
    pool.adapter_B[place_B] = torch.tensor(adapters, device=device)
    hidden = network.body(
        input_ids=tokens_BP, use_cache=False, tree=PromptPass(pool, place_B)
    ).last_hidden_state
    pool.fill(place_B, places, texts, valid_BP, hidden)
    return sum(map(len, texts))


def fill_suffixes(
    network: Network,
    prompts: Pool,
    of: Sequence[int],
    pool: Pool,
    suffixes: Sequence[Tokens],
    places: Sequence[int],
) -> int:
    """Run suffixes behind the prompts in places `of`, into theirs; the number of their tokens."""
    device = pool.shape.device
    tokens_BS, valid_BS = pad(suffixes, device)
    prompt_B, place_B = torch.tensor(of, device=device), torch.tensor(places, device=device)
    width = max(prompts.length[p] for p in of)
    valid_BP = torch.arange(width, device=device) < prompts.length_B[:, None]
    steps = torch.arange(tokens_BS.shape[1], device=device)
    hidden = network.body(
        input_ids=tokens_BS,
        position_ids=prompts.length_B[prompt_B, None] + steps,
        use_cache=False,
        tree=SuffixPass(prompts, prompt_B, valid_BP, pool, place_B),
    ).last_hidden_state
    pool.fill(place_B, places, suffixes, valid_BS, hidden)
    return sum(map(len, suffixes))
