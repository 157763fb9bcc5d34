"""Every type of causal language model that transformers has, built small."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from meal_fast.common import first_line
from meal_fast.config.config import PolicyConfig
from meal_fast.data_types import Prompt
from meal_fast.models import shared_prefix
from meal_fast.models.policy import Policy, load_policy
from meal_fast.models.probe import NEAR
from meal_fast.rollout import Request, Sampling, engine

HEADS, WIDTH = 4, 8
# Whatever of these names a configuration has is made small.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "embedding_size", "dim", "emb_dim",
            "word_embed_proj_dim",
        ),
        HEADS * WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_inner", "dim_ff",
            "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "intermediate_size_mlp", "dff",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
            "decoder_layers", "num_decoder_layers", "num_encoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "dim_head"), WIDTH),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size",
            "expert_dim", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
            "shared_intermediate_size", "moe_ffn_hidden_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
            "num_routed_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 16,
    "rotary_dim": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "state_size": 8, "mamba_d_ssm": 64, "n_mamba_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    "lru_width": 32, "attention_hidden_size": 32, "rescale_every": 0,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "max_target_positions": 128, "max_source_positions": 128,
    "num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 0,
    "sliding_window": 8, "attention_window_size": 8,
}  # fmt: skip
MOST = 20_000_000  # parameters
OWN: dict[str, dict[str, Any]] = {  # what a type insists on
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}
CAUSAL = {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}


def build(kind: str, vocabulary: int, *, plain: bool = False) -> Any:
    """Build a small model of a type with random weights, large enough that errors show.

    Its layers are of the kinds that its configuration has by default, two of each, and windows are
    8 tokens; or `plain`: full attention in every layer, and no window. Raises whatever its
    configuration or modules raise, and ValueError for one that does not become small.
    """
    made = getattr(tf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    failed: list[Exception] = []
    for mixed in (True, False):
        try:
            config = _small(CONFIG_MAPPING[kind], vocabulary, mixed, plain)
            if not isinstance(config, made.config_class):
                config = config.get_text_config(decoder=True)
            with torch.device("meta"):
                model = made._from_config(copy.deepcopy(config))
            size = sum(p.numel() for p in model.parameters())
            if size > MOST:
                raise ValueError(f"{size:,} parameters with all sizes small whose names we know")
            model = made._from_config(config)
            break
        except Exception as error:  # whatever configurations and models raise
            failed.append(error)
    else:
        raise failed[0]
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        own = 0 if p.dim() > 1 else p.data  # norms stay about 1
        p.data = own + 0.25 * torch.randn(p.shape, generator=generator)
    return model.float().eval()


def _small(kind: Any, vocabulary: int, mixed: bool, plain: bool) -> Any:
    default = kind()
    mapped = getattr(kind, "attribute_map", {})
    names = {*default.to_dict(), *mapped}
    fixed = {n for n in (*names, "layer_types") if isinstance(getattr(kind, n, None), property)}
    values = {n: v for n, v in {**SMALL, **CAUSAL}.items() if n in names - fixed}
    values = {n: v for n, v in values.items() if n not in mapped or mapped[n] not in values}
    ids = {n: 0 for n in ("bos_token_id", "pad_token_id", "decoder_start_token_id") if n in names}
    values |= {"vocab_size": vocabulary, "eos_token_id": 1, **ids}
    held = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if held and mixed and "layer_types" not in fixed:
        held = ["full_attention"] if plain else held
        values["layer_types"] = (held * 2)[: max(2, len(held))]
        values["num_hidden_layers"] = len(values["layer_types"])
    if plain and not held:
        values |= dict.fromkeys({"sliding_window", "attention_window_size"} & names)
    for name in getattr(kind, "sub_configs", None) or {}:
        sub = getattr(default, name, None)
        if isinstance(sub, tf.PretrainedConfig):
            values[name] = _small(type(sub), vocabulary, mixed, plain)
    values |= OWN.get(kind.model_type, {})
    return kind(**values)


def windowed(kind: str) -> bool:
    """Tell whether a type's layers are of several kinds or have windows: `plain` differs then."""
    try:
        default = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    except Exception:  # whatever a configuration raises; `judge` says what
        return False
    kinds = set(getattr(default, "layer_types", None) or [])
    return bool(kinds - {"full_attention"}) or hasattr(default, "sliding_window")


# ---- what becomes of it as a policy

NAMES = ("first", "second")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
TEXTS = ("a", "How do tides work?", "Say in a few words why it is that the sea rises twice a day.")
WEIGHTS = ((1.0, 0.0), (0.3, 0.7))


@dataclass(frozen=True)
class Outcome:
    """What became of a type: right, refused, wrong, traceback or not built."""

    kind: str
    said: str
    apart: float | None = None  # nats: the largest difference, where it loads
    reason: str = ""


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Bytes, and three special tokens; a chat template of the user's text alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    made = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def saved(kind: str, folder: Path, *, plain: bool = False) -> Path:
    """Build a model of a type and save it, with a tokenizer, as `load_policy` reads it."""
    words = tokenizer()
    build(kind, len(words) + 16, plain=plain).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def judge(kind: str, folder: Path, *, plain: bool = False, dtype: str = "float32") -> Outcome:
    """Build a type, load it, sample from it, and compare with transformers' plain forward."""
    try:
        saved(kind, folder, plain=plain)
    except Exception as error:  # whatever configurations and models raise
        return Outcome(kind, "not built", reason=first_line(error))
    config = PolicyConfig(path=str(folder), tuning="full", device="cpu", dtype=dtype)
    try:
        policy = load_policy(config, NAMES)
    except ValueError as error:
        text = str(error)
        good = "\n" not in text and text.startswith("policy") and len(text) < 600
        text = text.replace(f"policy.path={str(folder)!r}: ", "")
        return Outcome(kind, "refused" if good else "traceback", reason=text)
    except Exception as error:
        return Outcome(kind, "traceback", reason=first_line(error))
    try:
        apart = furthest(policy, folder)
    except Exception as error:
        return Outcome(kind, "traceback", reason=first_line(error))
    return Outcome(kind, "right" if apart < NEAR else "wrong", apart)


@torch.no_grad()
def furthest(policy: Policy, folder: Path) -> float:
    """Sample greedily and at temperature 1, several rows behind several prompts: how far, in nats,
    the sampler's log-probabilities and a packed pass's are at most from the plain model's, or how
    much less likely a greedy token is than the plain model's."""
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    requests = [Request(Prompt(text, text), w, samples=2) for text in TEXTS for w in WEIGHTS]
    most = 0.0
    for temperature in (0.0, 1.0):
        with engine(policy, max_rows=5) as sampler:
            rows = sampler.generate(requests, Sampling(20, temperature, seed=3))
        for r, g in enumerate(rows.groups):
            prefix, tokens = list(rows.prefix[g]), rows.tokens_RT[r][rows.mask_RT[r]].tolist()
            ids = torch.tensor([[*prefix, *tokens]])
            logits = plain(input_ids=ids).logits[0, len(prefix) - 1 : -1].float()
            logp = logits.log_softmax(-1)
            at = torch.tensor(tokens)[:, None]
            wanted = logp.gather(1, at)[:, 0]
            most = max(most, float((wanted - rows.logp_RT[r][rows.mask_RT[r]]).abs().max()))
            if not temperature:
                most = max(most, float((logp.max(1).values - wanted).max()))
            packed = shared_prefix.pack([prefix], [0], [len(tokens)], torch.tensor([tokens]))
            states = packed.predicting(shared_prefix.forward(policy.network.body, packed))
            learned = policy.network.logits(states).log_softmax(-1)
            most = max(most, float((learned - logp).abs().max()))
    return most
