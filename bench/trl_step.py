"""TRL's side: GRPOTrainer on the workload of workload.py, one JSON line a step.

    python -m bench.trl_step --model FOLDER --steps 3

TRL's defaults hold wherever the workload says nothing; what differs is named below.
"""

import tempfile
import time

import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.workload import (
    BETA,
    LR,
    MAX_GRAD_NORM,
    NEW_TOKENS,
    PROMPTS,
    SAMPLES,
    TEMPERATURE,
    arguments,
    report_end,
    report_step,
    reward,
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--gradient-checkpointing",
        choices=("default", "on", "off"),
        default="default",
        help="default: as GRPOConfig has it",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seen: list[int] = []  # tokens of every completion of the current step

    def reward_function(completions: list, completion_ids: list, **_: object) -> list[float]:
        seen.extend(map(len, completion_ids))
        return reward([turns[0]["content"] for turns in completions])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            seen.clear()
            self.begin = time.perf_counter()

        def on_step_end(self, _: object, state: transformers.TrainerState, *__: object, **___):
            # A step ends when its update is done; the rollout is part of it.
            seconds = time.perf_counter() - self.begin
            if seen != [NEW_TOKENS] * (len(PROMPTS) * SAMPLES):
                raise RuntimeError(f"token counts {seen}, not {NEW_TOKENS} each")
            report_step("trl", state.global_step, seconds, sum(seen))

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=len(PROMPTS) * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            # min_new_tokens keeps the end-of-turn token away, so that all sides count alike.
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            temperature=TEMPERATURE,
            beta=BETA,
            loss_type="grpo",
            learning_rate=LR,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        if args.gradient_checkpointing != "default":
            config.gradient_checkpointing = args.gradient_checkpointing == "on"
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
        trainer = GRPOTrainer(
            model=args.model,
            reward_funcs=reward_function,
            args=config,
            train_dataset=Dataset.from_list(rows * args.steps),
            callbacks=[Clock()],
        )
        trainer.train()
    report_end(
        "trl",
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        gradient_checkpointing=str(config.gradient_checkpointing),
    )


if __name__ == "__main__":
    main()
