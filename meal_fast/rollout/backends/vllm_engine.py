"""vLLM's engine: one for as long as a process samples by it, and how weights are pushed into it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from meal_fast.common import first_line
from meal_fast.models.export import ADAPTER

WORKER = "meal_fast.rollout.backends.vllm_worker.PushedWeights"
BLOCK = 32  # tokens of a block of keys and values on a CPU, where vLLM's own 128 reuse no short one
# Of whoever started this process: vLLM's are processes of their own, and a world of their own.
LAUNCHERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Needs:
    """What an engine is opened for: another one is opened where these differ."""

    path: str  # the base model's folder
    dtype: str  # of weights and products, by torch's name
    rank: int = 0  # of the adapters, 0 for none
    adapters: int = 1  # of tasks, at once
    cache_bytes: int = 2**31  # of keys and values
    context: int = 0  # the most tokens that a row can have

    @property
    def room(self) -> int:
        """Give the rank that vLLM keeps room for: it knows certain ones, powers of two among them.

        0 where there are no adapters.
        """
        return max(8, 1 << (self.rank - 1).bit_length()) if self.rank else 0

    def serve(self, other: Needs) -> bool:
        """Tell whether an engine that was opened for these serves the others as well."""
        same = (self.path, self.dtype, self.cache_bytes) == (
            other.path, other.dtype, other.cache_bytes,
        ) and bool(self.rank) == bool(other.rank)  # fmt: skip
        mine, theirs = ((n.room, n.adapters, n.context) for n in (self, other))
        return same and all(a >= b for a, b in zip(mine, theirs, strict=True))


def vllm_options(needs: Needs, *, cpu: bool) -> dict[str, Any]:
    """Give what vLLM's engine is made with. `cpu`: whether vLLM is one for CPUs."""
    options: dict[str, Any] = {
        "model": needs.path,
        "dtype": needs.dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling options that the model came with
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # at the sampler's temperature
        "max_model_len": -1,  # the model's context, or what memory has room for
        "kv_cache_memory_bytes": needs.cache_bytes,
        "worker_extension_cls": WORKER,
        "use_tqdm_on_load": False,
    }
    if cpu:
        options |= {
            "block_size": BLOCK,
            "enforce_eager": True,  # compiled, a model takes minutes to open
            # A row with a seed whose prompt comes in two chunks ends vLLM 0.32 on a CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, needs.context),
        }
    if needs.rank:
        options |= {
            "enable_lora": True,
            "max_lora_rank": needs.room,
            "max_loras": needs.adapters,
        }
    return options


class VLLMEngine:
    """One `vllm.LLM`, in processes of its own, and the weights that were pushed into it.

    `version` counts the pushes. Raises ValueError, in one line, for whatever vLLM raises.
    """

    def __init__(self, needs: Needs) -> None:
        self.needs, self.version = needs, 0
        self.adapters: list[Any] = []  # LoRARequests of the last push
        self._folder = Path(tempfile.mkdtemp(prefix="meal-fast-vllm-"))
        with _own_environment(), self._one_line("cannot be opened"):
            from vllm import LLM
            from vllm.platforms import current_platform

            before = multiprocessing.active_children()
            self.llm = LLM(**vllm_options(needs, cpu=current_platform.is_cpu()))
            self._processes = [p for p in multiprocessing.active_children() if p not in before]
            self._call(self.llm.collective_rpc, "end_with", args=(os.getpid(),))

    def push_adapters(self, writers: Sequence[Callable[[Path], None]]) -> list[Any]:
        """Load adapters in place of the last ones, and give their `LoRARequest`s.

        writers: of each adapter what writes it, in PEFT's format, into `adapter/` of a folder. An
        adapter's number and name are those of no earlier one: vLLM keeps by them what it has.
        """
        from vllm.lora.request import LoRARequest

        engine = self.llm.llm_engine
        self._clear()
        self.version += 1
        made = []
        for task, write in enumerate(writers):
            folder = self._folder / f"{self.version}-{task}"
            folder.mkdir()
            write(folder)
            number = (self.version - 1) * self.needs.adapters + task + 1
            made.append(LoRARequest(f"policy-{folder.name}", number, str(folder / ADAPTER)))
        with self._one_line("does not take the adapters"):
            for old in self.adapters:
                self._call(engine.remove_lora, old.lora_int_id)
            self.adapters = made
            for request in made:
                if not self._call(engine.add_lora, request):
                    raise ValueError(f"{request.lora_name} was not loaded")
        return made

    def push_weights(self, model: Any) -> None:
        """Load all weights of a transformers model in place of those that are there."""
        self._clear()
        self.version += 1
        folder = self._folder / str(self.version)
        model.save_pretrained(folder)
        with self._one_line("does not take the weights"):
            self._call(self.llm.collective_rpc, "take_weights", args=(str(folder),))
        self._clear()

    def generate(self, prompts: list[Any], settings: list[Any], adapters: list[Any]) -> list[Any]:
        """Answer every prompt: `LLM.generate`. `adapters`: of each, or None."""
        own = adapters if self.needs.rank else None
        with self._one_line("does not answer"):
            return self._call(
                self.llm.generate, prompts, settings, lora_request=own, use_tqdm=False
            )

    def close(self) -> None:
        """End vLLM's processes, and remove what was written for them."""
        llm = self.__dict__.pop("llm", None)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown(timeout=60)  # killed, it leaves memory behind
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call vLLM, and look meanwhile whether its process is there: it would wait for ever."""
        found: list[Any] = []
        failed: list[BaseException] = []

        def call() -> None:
            try:
                found.append(function(*args, **options))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=call, daemon=True, name="vllm")
        thread.start()
        while thread.is_alive():
            thread.join(1.0)
            if not all(process.is_alive() for process in self._processes):
                thread.join(5.0)  # it may have a better word for it
                if not failed and not found:
                    raise ValueError("its process has ended")
                break
        if failed:
            raise failed[0]
        return found[0]

    def _clear(self) -> None:
        for folder in self._folder.iterdir():
            shutil.rmtree(folder)

    @contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of other people's code: it may be anything
            close_vllm()
            self.close()
            raise ValueError(
                f"rollout.backend='vllm': vLLM {what} ({first_line(error)}); what it wrote above "
                "says more (VLLM_LOGGING_LEVEL=INFO: most); go on with --resume, or use "
                "rollout.backend=engine"
            ) from error


_held: list[VLLMEngine] = []  # the one that is open


def vllm_engine(needs: Needs) -> VLLMEngine:
    """Give the engine that is open, where it serves `needs`; else close it and open another.

    Opening takes seconds, so that it stays open until the process ends, or `close_vllm`.
    """
    if not _held or not _held[0].needs.serve(needs):
        close_vllm()
        _held.append(VLLMEngine(needs))
    return _held[0]


@atexit.register
def close_vllm() -> None:
    """Close the engine, where one is open."""
    while _held:
        _held.pop().close()


def require_vllm() -> None:
    """Raise ValueError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ValueError(
            "rollout.backend='vllm': vLLM is not installed; install meal-fast[vllm], or use "
            "rollout.backend=engine"
        )


def check_served(config: Any) -> None:
    """Raise ValueError where vLLM on a CPU has no attention for a model of this configuration."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in sizes:
        raise ValueError(
            f"rollout.backend='vllm': heads of {size} numbers, where vLLM on a CPU has attention "
            f"for {', '.join(map(str, sizes))}; use rollout.backend=engine, or another model"
        )


@contextmanager
def _own_environment() -> Iterator[None]:
    """Open vLLM's processes with our threads, no report to its makers, and in a world of their own.

    vLLM writes into the environment of whoever opens it; that is undone.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHERS) or name.endswith("WORLD_SIZE"):
            del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Bound to cores, the engines of several processes would all be on the first.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
