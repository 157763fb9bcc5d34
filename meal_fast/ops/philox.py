"""Philox4x32-10: random numbers that are a function of a key and a counter, and of nothing else.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 [P].
Words are uint32 values held in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Turn (R, 4) counter words and a key of two words into (R, 4) random words."""
    multiplier = torch.tensor(_MULTIPLIER, dtype=torch.int64, device=counter.device)
    even, odd = counter[:, 0::2], counter[:, 1::2]
    keys = [[(k + i * w) & _WORD for k, w in zip(key, _WEYL, strict=True)] for i in range(_ROUNDS)]
    for key_R2 in torch.tensor(keys, dtype=torch.int64, device=counter.device):
        # The product has 64 bits, unsigned: int64 wraps, but holds them all.
        product = (even * multiplier).flip(1)
        even, odd = ((product >> 32) & _WORD) ^ odd ^ key_R2, product & _WORD
    return torch.stack((even[:, 0], odd[:, 0], even[:, 1], odd[:, 1]), 1)


def uniform(seed: int, row: Tensor, position: Tensor) -> Tensor:
    """Draw (R,) float64 in [0, 1), 53 bits, a function of (seed, row, position) alone.

    Key: the seed's low and high word. Counter: position's low and high word, then the row's.
    """
    words = torch.stack((position, row), 1)
    counter = torch.stack((words & _WORD, (words >> 32) & _WORD), 2).flatten(1)
    random = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return ((random[:, 0] >> 5) * 2**26 + (random[:, 1] >> 6)).double() * 2**-53
