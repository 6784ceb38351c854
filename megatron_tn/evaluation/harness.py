"""A model behind lm-evaluation-harness's interface (the package lm_eval, an extra)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from tokenizers import Tokenizer

from megatron_tn.evaluation.encoding import encode_pair, encode_text
from megatron_tn.evaluation.scores import SHORTEST, row_scores
from megatron_tn.inference.rows import batches_of, generate_rows
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.base import Model

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")  # generation_kwargs of tasks


class HarnessModel(LM):
    """tokenizer: reads `</s>` in a text as those four letters. batch_tokens, window: see `row_scores`. progress(n):
    called after each batch of n requests. seed: of sampled generation.

    Every text begins with the model's bos, once, which is never scored. A text's whole past is seen, however long it
    is. Collective over tensor parallelism; every rank gets all results.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 4096,
        window: int = 256,
        seed: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.options = {"batch_tokens": batch_tokens, "window": window, "progress": progress}
        self.seed = seed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): ln p(continuation | context), and whether greedy decoding gives it."""
        bos = self.model.config.bos_id
        pairs = [encode_pair(self.tokenizer, bos, *request.args) for request in requests]
        found = [(0.0, True)] * len(pairs)
        rows, first = [ids for ids, _ in pairs], [place for _, place in pairs]
        for index, nats, greedy in row_scores(self.model, rows, first, greedy=True, **self.options):
            found[index] = -float(nats.sum(dtype=float)), bool(greedy.all())
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p(text) of each request's (text,)."""
        bos = self.model.config.bos_id
        rows = [encode_text(self.tokenizer, bos, request.args[0]) for request in requests]
        found = [0.0] * len(rows)
        for index, nats, _ in row_scores(self.model, rows, **self.options):
            found[index] = -float(nats.sum(dtype=float))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What follows each request's (context, settings), up to the first of its stop texts, which is left out.

        settings: `GENERATION`. Sampled text depends on the seed and the request's place, not on the batch.
        """
        bos = self.model.config.bos_id
        prompts = [encode_text(self.tokenizer, bos, request.args[0]).tolist() for request in requests]
        settings = [normalize_gen_kwargs(request.args[1] or {}) for request in requests]
        rows = max(self.options["batch_tokens"] // SHORTEST, 1)
        found = [""] * len(requests)
        for batch in batches_of(list(map(len, prompts)), rows):
            texts = self._generate([prompts[i] for i in batch], [settings[i] for i in batch], batch)
            for place, text in zip(batch, texts, strict=True):
                found[place] = text
            self.options["progress"](len(batch))
        return found

    def _generate(
        self, prompts: list[list[int]], settings: Sequence[dict[str, Any]], places: Sequence[int]
    ) -> list[str]:
        samplers = [sampler_of(one) for one in settings]
        draws = [torch.Generator().manual_seed(self.seed + place) for place in places]
        texts = [""] * len(prompts)

        def choose(rows: list[int], logits: torch.Tensor) -> torch.Tensor:
            if all(samplers[row].temperature == 0 for row in rows):
                return logits.argmax(-1)
            parts = zip(rows, logits.split(1), strict=True)
            return torch.cat([samplers[row](part, draws[row]) for row, part in parts])

        def is_done(row: int, ids: list[int]) -> bool:
            ended = ids[-1] == self.model.config.eos_id
            text = self.tokenizer.decode(ids[:-1] if ended else ids)
            stops = [place for stop in settings[row]["until"] if stop and (place := text.find(stop)) >= 0]
            texts[row] = text[: min(stops)] if stops else text
            return ended or bool(stops) or len(ids) >= settings[row]["max_gen_toks"]

        generate_rows(self.model, prompts, choose=choose, is_done=is_done, window=self.options["window"])
        return texts


def sampler_of(settings: dict[str, Any]) -> Sampler:
    """settings: as `normalize_gen_kwargs` returns them."""
    if not settings["do_sample"]:
        return Sampler(temperature=0)
    return Sampler(settings.get("temperature", 1.0), settings.get("top_k", 0), settings.get("top_p", 1.0))
