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

from bench import workload


def main() -> None:
    parser = workload.arguments(__doc__)
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
        return workload.reward([turns[0]["content"] for turns in completions])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            seen.clear()
            self.begin = time.perf_counter()

        def on_step_end(self, _: object, state: transformers.TrainerState, *__: object, **___):
            # A step ends when its update is done; the rollout is part of it.
            seconds = time.perf_counter() - self.begin
            if seen != [workload.NEW_TOKENS] * (len(workload.PROMPTS) * workload.SAMPLES):
                raise RuntimeError(f"token counts {seen}, not {workload.NEW_TOKENS} each")
            workload.report_step("trl", state.global_step, seconds, sum(seen))

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=len(workload.PROMPTS) * workload.SAMPLES,
            num_generations=workload.SAMPLES,
            max_completion_length=workload.NEW_TOKENS,
            # min_new_tokens keeps the end-of-turn token away, so that all sides count alike.
            generation_kwargs={"min_new_tokens": workload.NEW_TOKENS},
            temperature=workload.TEMPERATURE,
            beta=workload.BETA,
            loss_type="grpo",
            learning_rate=workload.LR,
            max_grad_norm=workload.MAX_GRAD_NORM,
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
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in workload.PROMPTS]
        trainer = GRPOTrainer(
            model=args.model,
            reward_funcs=reward_function,
            args=config,
            train_dataset=Dataset.from_list(rows * args.steps),
            callbacks=[Clock()],
        )
        trainer.train()
    workload.report_end(
        "trl",
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        gradient_checkpointing=str(config.gradient_checkpointing),
    )


if __name__ == "__main__":
    main()
