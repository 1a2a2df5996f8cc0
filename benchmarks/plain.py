"""Theirs: plain transformers in this process, at its best setting."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.measured import seconds
from benchmarks.workload import GREEDY


class Plain:
    """A model in float32 with scaled-dot-product attention, a KV cache and no gradients."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._threads = threads
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None  # nothing to look out for
        wte = self._model.get_input_embeddings().weight
        numbers = sum(weight.numel() for weight in self._model.parameters())
        tied = self._model.get_output_embeddings().weight is wte
        looked_up = self._model.transformer.wpe.weight.numel() + (0 if tied else wte.numel())
        self.weights_bytes = 4 * numbers
        self.weights_per_token = numbers - looked_up
        """Numbers read for each token: all weights but those looked up row by row."""

    def generate(
        self,
        prompt: list[int],
        new: int,
        sampling: Mapping[str, float] = GREEDY,
        sequences: int = 1,
        beams: int = 1,
    ) -> float:
        """Seconds to continue a prompt by ``new`` tokens, ``sequences`` times in one batch.

        Temperature 0 is greedy, or with several ``beams`` a beam search.
        """
        ids = self._ids(prompt)
        how = {**sampling, "top_k": 0} if sampling["temperature"] else {}

        def work() -> None:
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=bool(how),
                num_return_sequences=sequences,
                num_beams=beams,
                **how,
            )
            assert output.shape == (sequences, len(prompt) + new)

        with torch.inference_mode():
            return seconds(work)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for one pass over a prompt that leaves its K/V and the last logits."""
        ids = self._ids(prompt)
        with torch.inference_mode():
            return seconds(lambda: self._model(ids, use_cache=True, logits_to_keep=1))

    def attentions(self, prompt: list[int]) -> float:
        """Seconds for one pass over a prompt that gives the attention weights of every layer."""
        ids = self._ids(prompt)
        self._model.set_attn_implementation("eager")
        try:
            with torch.inference_mode():
                return seconds(lambda: self._model(ids, output_attentions=True, logits_to_keep=1))
        finally:
            self._model.set_attn_implementation("sdpa")

    def kv_cache(self, prompt: list[int]) -> Any:
        """The K/V of a prompt."""
        ids = self._ids(prompt)
        with torch.inference_mode():
            return self._model(ids, use_cache=True, logits_to_keep=1).past_key_values

    @staticmethod
    def copy(kv_cache: Any) -> float:
        """Seconds to copy a KV cache, which is how a text is forked there."""
        return seconds(lambda: copy.deepcopy(kv_cache))

    @staticmethod
    def kv_bytes(kv_cache: Any) -> int:
        """Bytes of a KV cache."""
        return sum(kv.nbytes for layer in kv_cache.layers for kv in (layer.keys, layer.values))

    def _ids(self, prompt: list[int]) -> torch.Tensor:
        torch.set_num_threads(self._threads)
        return torch.tensor([prompt])
