"""The tiny world's policy with heads of 32 numbers, for which vLLM has an attention on a CPU."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from meal_fast.data.toy import build_world


def wide_world(folder: Path) -> Path:
    """Writes it into `folder`: the world's embedding and MLPs, attention drawn anew."""
    tiny = AutoModelForCausalLM.from_pretrained(build_world("tiny"), dtype=torch.float32)
    values = tiny.config.to_dict() | {"head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**values)).float()
    generator = torch.Generator().manual_seed(0)
    theirs = tiny.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(build_world("tiny")).save_pretrained(folder)
    return folder
