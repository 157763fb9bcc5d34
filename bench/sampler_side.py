"""One side of the sampler comparison: meal-fast's engine, or transformers' `generate`.

python -m bench.sampler_side --side generate --case long

Cases (SmolLM2-135M, float32, temperature 1, nothing truncated, no token ends a response):

    long    8 prompts of 200 tokens x 8 samples, 64 new tokens
    short   the same with 35 tokens
    sweep   16 prompts of about 60 tokens x 28 preferences, 32 new tokens; `generate` is called once
            a preference
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

CASES = {"long": (200, 8, 8, 64), "short": (35, 8, 8, 64), "sweep": (60, 16, 1, 32)}
WEIGHTS = [(i / 27, 1 - i / 27) for i in range(28)]
NAMES = ("helpful", "harmless")
WORDS = (
    "a quick fox jumps over lazy dogs while rain falls on green hills and people walk home".split()
)


def texts(tokenizer: transformers.PreTrainedTokenizerBase, tokens: int, count: int) -> list[str]:
    """Prompts that are `tokens` long with the chat template around them, no two alike."""

    def length(text: str) -> int:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        return len(ids["input_ids"])

    made = []
    for i in range(count):
        text = f"{i}"
        while length(text) < tokens:
            text += " " + WORDS[(i * 7 + len(text)) % len(WORDS)]
        made.append(text)
    return made


def forget_peak() -> None:
    """From here on VmHWM counts anew: loading is left out."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Ours:
    def __init__(self, model: str) -> None:
        from bench.endless import endless
        from meal_fast.config.config import PolicyConfig
        from meal_fast.models.policy import load_policy

        config = PolicyConfig(path=model, tuning="full", device="cpu")
        self.policy = endless(load_policy(config, NAMES))
        self.tokenizer = self.policy.tokenizer

    def __call__(
        self,
        prompts: Sequence[str],
        weights: Sequence[tuple[float, ...] | None],
        samples: int,
        new: int,
    ) -> tuple[int, int]:
        """Sampled tokens, and tokens of prompts and preferences through the model."""
        from meal_fast.data_types import Prompt
        from meal_fast.rollout import Request, rollout

        requests = [Request(Prompt(p, p), w, samples) for p in prompts for w in weights]
        out = rollout(self.policy, requests, max_new_tokens=new, temperature=1.0, seed=0)
        return int(out.mask_RT.sum()), out.prefill_tokens


class Generate:
    def __init__(self, model: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        weights: Sequence[tuple[float, ...] | None],
        samples: int,
        new: int,
    ) -> tuple[int, int]:
        from meal_fast.data.preferences import preference_text

        tokens = prefill = 0
        for w in weights:
            said = "" if w is None else f" {preference_text(w, NAMES, 'bar')}"
            chats = [[{"role": "user", "content": p + said}] for p in prompts]
            given = self.tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            out = self.model.generate(
                **given,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=self.tokenizer.eos_token_id,
            )
            tokens += (out.shape[1] - given["input_ids"].shape[1]) * out.shape[0]
            prefill += int(given["attention_mask"].sum()) * samples
        return tokens, prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("meal-fast", "generate"), required=True)
    parser.add_argument("--case", choices=tuple(CASES), required=True)
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    side = Ours(args.model) if args.side == "meal-fast" else Generate(args.model)
    length, count, samples, new = CASES[args.case]
    prompts = texts(side.tokenizer, length, count)
    weights: list[tuple[float, ...] | None] = list(WEIGHTS) if args.case == "sweep" else [None]
    side(prompts[:2], weights[:1], samples, 2)  # warms up
    forget_peak()
    loaded = memory("VmRSS")
    begin = time.perf_counter()
    tokens, prefill = side(prompts, weights, samples, new)
    row = {
        "framework": args.side,
        "seconds": round(time.perf_counter() - begin, 3),
        "tokens": tokens,
        "prefill_tokens": prefill,
        "loaded_bytes": loaded,
        "peak_rss_bytes": memory("VmHWM"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
