"""Worlds small enough to know: a random policy that fits on a page, and a front found by counting.

    tiny           some prompts; for tests, and for reading the code with a debugger
    concave-front  one prompt; every reachable reward is known, so training can be held to the truth

Both have the policy of `build_world`, a random two-layer model that answers in a's, b's and c's,
and the rewards `first` and `second`: exact functions of the first L = 6 characters of a response,

    r_1 = (number of a's / L)^p        r_2 = (number of b's / L)^p        p = 1.5

Responses without a c trade one reward for the other: L + 1 points that no other dominates. As p > 1
they lie below the straight line between the ends, that is, the front is concave seen from above: no
linear score has an optimum between the ends, while the Tchebycheff scores have one at every point.

A *stochastic* policy is not held to that front. Its mean rewards are mixtures: half "aaaaaa",
half "bbbbbb" gives (0.5, 0.5), above the front's own middle (0.354, 0.354). So compare greedy
responses with the truth; plot means of samples apart, beside the convex hull.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meal_fast.data_types import rng_seed

from .assets.keys import code_digest, library_versions
from .assets.parts import build_part, worlds_dir
from .preferences import Preference, lattice, preference_text

Array = NDArray[np.float64]
Score = Literal["linear", "tchebycheff", "smooth-tchebycheff"]

LENGTH = 6  # L, characters of a response that count, one token each
POWER = 1.5  # p; above 1 the front is concave
LETTERS = "abc"  # a for `first`, b for `second`, c for neither
OBJECTIVES = ("first", "second")
UTOPIA = (1.1, 1.1)  # z*: every reward is at most 1; a tenth of the range above, as by default

_SEED = 0
_WORD = r" ?[a-z]+=[0-9]\.[0-9][0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|[0-9]|\s+"
_TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"  # what the chat template writes
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PROMPTS = {
    "concave-front": (("Write six letters.",), ("Write six letters.",)),
    "tiny": (
        tuple(f"Write a {kind} {thing}." for kind in ("short", "long") for thing in
              ("word", "song", "name", "letter", "note", "rhyme", "list", "poem")),
        tuple(f"Write a new {thing}." for thing in ("word", "song", "name", "letter")),
    ),
}  # fmt: skip


def first(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """(a's among the first L characters / L)^p, in [0, 1]; an objective, exact and known."""
    return [_share(response, LETTERS[0]) for response in responses]


def second(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """(b's among the first L characters / L)^p, in [0, 1]; an objective, exact and known."""
    return [_share(response, LETTERS[1]) for response in responses]


def world_objective(name: str) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The function of `world:NAME`. Raises ValueError for a name that has none."""
    if name not in OBJECTIVES:
        raise ValueError(f"world:{name}: no objective; choose from {', '.join(OBJECTIVES)}")
    return {"first": first, "second": second}[name]


def _share(response: str, letter: str) -> float:
    return float((response[:LENGTH].count(letter) / LENGTH) ** POWER)


@dataclass(frozen=True)
class Truth:
    """Every response that can matter, and its rewards: what training is held to.

    A response is LENGTH letters. Any other text has the rewards of one of these: what is neither a
    nor b counts as a c, as do characters that a shorter text lacks.
    """

    responses: tuple[str, ...]  # M = 3^6
    reward_MK: Array

    @property
    def front(self) -> Array:
        """The non-dominated rewards (F, 2), each once, from best in `second` to best in `first`."""
        points = np.unique(self.reward_MK, axis=0)
        # The points differ, so one that is at least as good in both is better in one.
        as_good = (points[None] >= points[:, None]).all(2)
        return points[as_good.sum(1) == 1]  # no other than itself

    def scores(self, score: Score, w: Preference, mu: float = 0.1) -> Array:
        """The score of every response (M,) at preference w and z* = UTOPIA; float64."""
        return score_of(self.reward_MK, score, w, mu)

    def optimal(self, score: Score, w: Preference, mu: float = 0.1) -> frozenset[str]:
        """All responses whose score is the best there is (to 1e-9)."""
        values = self.scores(score, w, mu)
        return frozenset(self.responses[i] for i in np.flatnonzero(values >= values.max() - 1e-9))

    def regret(self, response: str, score: Score, w: Preference, mu: float = 0.1) -> float:
        """How far a response's score lies below the best one: 0 for an optimal response."""
        reward = np.array([[_share(response, letter) for letter in LETTERS[:2]]])
        best = self.scores(score, w, mu).max()
        return max(0.0, float(best - score_of(reward, score, w, mu)[0]))

    def largest_gap(self, score: Score, mu: float = 0.1, points: int = 11) -> float:
        """Largest distance between neighbours among the optima of a sweep of `points` weights."""
        chosen = {y for w in lattice(2, points) for y in self.optimal(score, w, mu)}
        return gap_of(self.reward_MK[[y in chosen for y in self.responses]])

    def distance(self, reward_NK: Array) -> Array:
        """Distance of each reward vector (N, 2) to the nearest point of the true front (N,)."""
        return np.linalg.norm(reward_NK[:, None] - self.front[None], axis=-1).min(1)


def truth() -> Truth:
    """`concave-front`, enumerated."""
    responses = tuple("".join(letters) for letters in product(LETTERS, repeat=LENGTH))
    return Truth(responses, np.array([first((), responses), second((), responses)]).T)


def score_of(reward_MK: Array, score: Score, w: Preference, mu: float = 0.1) -> Array:
    """Linear, Tchebycheff or smooth Tchebycheff score of rewards (M, 2) at z* = UTOPIA, float64.

    Written apart from `meal_fast.ops` on purpose: the truth must not share a mistake with training.
    """
    weight = np.asarray(w, dtype=np.float64)
    if score == "linear":
        return reward_MK @ weight
    shortfall = weight * (np.asarray(UTOPIA) - reward_MK)
    if score == "tchebycheff":
        return -shortfall.max(1)
    if score != "smooth-tchebycheff":
        raise ValueError(f"score={score!r}: choose linear, tchebycheff or smooth-tchebycheff")
    if not (mu > 0 and math.isfinite(mu)):
        raise ValueError(f"mu={mu!r}: must be positive")
    return -mu * np.logaddexp(shortfall[:, 0] / mu, shortfall[:, 1] / mu)


def gap_of(points: Array) -> float:
    """Largest distance between neighbours along the first reward; 0 where all points are one."""
    steps = np.diff(np.unique(points, axis=0), axis=0)
    return float(np.linalg.norm(steps, axis=1).max()) if len(steps) else 0.0


def world_prompts(name: str, split: str) -> tuple[str, ...]:
    """The prompts of a world to train on (split "train") or hold out (any other).

    `concave-front` has a single prompt, for both. Raises ValueError for an unknown name.
    """
    _known(name)
    return _PROMPTS[name][0 if split == "train" else 1]


def build_world(name: str, folder: Path | None = None) -> Path:
    """The folder of a world's policy, for `AutoModelForCausalLM` and `AutoTokenizer`; built once.

    Kept in `folder` (default: `worlds_dir()`), whole or not at all, under a key of the code and the
    libraries that make it. The same bytes on every CPU, with the same libraries. Raises ValueError
    for an unknown name.
    """
    _known(name)
    place = (folder or worlds_dir()) / name
    here = Path(__file__)
    made_by = [here, here.with_name("preferences.py"), here.parents[1] / "data_types.py"]
    libraries = ("safetensors", "tokenizers", "torch", "transformers")
    made_from = {
        "world": name,
        "seed": _SEED,
        "code": code_digest(made_by),
        "libraries": library_versions(libraries),
    }
    build_part(place, made_from, tiny_model)
    return place


def _known(name: str) -> None:
    if name not in _PROMPTS:
        raise ValueError(f"world:{name}: unknown; choose from {', '.join(_PROMPTS)}")


def tiny_model(folder: Path) -> None:
    """Writes the random policy of the worlds and its tokenizer into `folder`.

    A Llama of two layers, hidden width 32, 4 heads on 2 of keys and values, tied head, float32.
    Every parameter is drawn with a seed from its name: no library's own order enters.
    """
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the class draws weights of its own
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Half for what adds to the residual stream, so that the blocks do not drown the words.
            scale = 0.05 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.1
            parameter.copy_(_noise(name, parameter.shape, scale) if parameter.dim() > 1 else 1.0)
        # A direction common to all embeddings survives in every hidden state; more of it in a, b
        # and c makes their logits larger everywhere: the policy babbles, and so explores, these.
        embedding = model.get_input_embeddings().weight
        common = _noise("common", embedding[0].shape, 0.2)
        embedding += common
        embedding[tokenizer.convert_tokens_to_ids(list(LETTERS))] += common
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _noise(name: str, shape: Sequence[int], scale: float) -> torch.Tensor:
    """N(0, scale²), float32, of a multiple of 16 numbers: the same bits on every CPU.

    Box and Muller's cosines and sines of torch's uniform numbers (which are whole multiples of
    2^-24), in float64: `torch.randn` makes them in float32, and its last digits depend on the CPU.
    """
    generator = torch.Generator().manual_seed(rng_seed(_SEED, name) % 2**31)
    u = torch.rand(math.prod(shape), generator=generator).double().view(-1, 2, 8)
    radius, angle = torch.sqrt(-2.0 * torch.log(1.0 - u[:, 0])), 2.0 * math.pi * u[:, 1]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return (scale * normal).float().view(*shape)


def _tokenizer() -> Any:
    """A byte-level BPE for which every word of the worlds' conversations is one token.

    `first=0.80` is one too (a preference off the 11-point grid falls into pieces): a model of this
    size sees which tokens are there long before it learns to look where a number stands. The
    letters of a response stay single, and any text comes back whole.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_conversations(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE,
        model_max_length=512,
    )


def _conversations() -> list[str]:
    prompts = sorted({text for splits in _PROMPTS.values() for split in splits for text in split})
    said = [f" {preference_text(w, OBJECTIVES, 'numbers')}" for w in lattice(2, 11)]
    return [
        _TURN.format(role="system", text="") + _TURN.format(role="user", text=prompt + preference)
        + "<|im_start|>assistant\n"
        for prompt in prompts
        for preference in said
    ]  # fmt: skip
