"""What runs inside vLLM's own worker process: `worker_extension_cls` of the backend `vllm`."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any


class PushedWeights:
    """Adds methods to vLLM's worker, which `LLM.collective_rpc` calls by their names."""

    def take_weights(self, folder: str) -> None:
        """Load the weights of the model in `folder`, in place of those that are there.

        vLLM (0.32) packs each weight for a CPU's products when it is loaded. A head that is tied to
        the embedding has nothing loaded by itself, so that `reload_weights` leaves its packed copy
        as it was, and the model answers with new layers under an old head: it is packed again here.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        worker: Any = self
        worker.reload_weights(weights_path=folder)
        for module in worker.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def end_with(self, process: int) -> None:
        """End vLLM's processes when `process`, whose they are, is no more: killed, say."""

        def watch() -> None:
            while os.path.exists(f"/proc/{process}"):
                time.sleep(2.0)
            os.kill(os.getppid(), signal.SIGKILL)  # vLLM's core, whose worker this is
            os._exit(1)

        if os.path.isdir("/proc/self"):
            threading.Thread(target=watch, daemon=True, name="watch").start()
