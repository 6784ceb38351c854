"""A model behind lm-evaluation-harness's interface (the package lm_eval, an extra)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from tokenizers import Tokenizer

from megatron_tn.config import ConfigError
from megatron_tn.evaluation.encoding import encode_pair, encode_text
from megatron_tn.evaluation.scores import SHORTEST, row_scores
from megatron_tn.inference.rows import generate_shared
from megatron_tn.inference.sampler import Sampler
from megatron_tn.inference.uniform import stream_key
from megatron_tn.model.base import Model

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")  # generation_kwargs of tasks


class HarnessModel(LM):
    """tokenizer: reads `</s>` in a text as those four letters. batch_tokens, window: see `row_scores`. progress(n,
    tokens): called after each batch of n requests, of so many tokens. seed: of sampled generation.

    Every text begins with the model's bos, once, which is never scored. A text's whole past is seen, however long it
    is. Collective over the ranks of model.context, of which those with the same parameters share the requests; every
    rank gets all results.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 4096,
        window: int = 256,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda requests, tokens: None,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.options = {"batch_tokens": batch_tokens, "window": window, "progress": progress}
        self.seed = seed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p(continuation | context), and whether greedy decoding gives it."""
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
        texts = [
            _Text(self.tokenizer, self.model.config.eos_id, *generation_of(request.args[1] or {}))
            for request in requests
        ]
        prompts = [self._prompt(request.args[0], text.most) for request, text in zip(requests, texts, strict=True)]
        found = [""] * len(texts)
        for batch, rows in generate_shared(
            self.model,
            prompts,
            [text.sampler for text in texts],
            [stream_key(self.seed, number) for number in range(len(texts))],
            is_done=lambda number, ids: texts[number].read(ids)[1],
            rows=max(self.options["batch_tokens"] // SHORTEST, 1),
            window=self.options["window"],
        ):
            for number, ids in zip(batch, rows, strict=True):
                found[number], _ = texts[number].read(ids)
            self.options["progress"](len(batch), sum(len(prompts[number]) for number in batch))
        return found

    def _prompt(self, context: str, new: int) -> list[int]:
        """The prompt; its beginning is cut off where a model built for max_length tokens has no room for it."""
        ids = encode_text(self.tokenizer, self.model.config.bos_id, context).tolist()
        room = self.model.config.max_length - new + 1
        return ids if not self.model.config.max_length or len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


class _Text:
    """What is generated for one request. stops, most, sampler: as `generation_of` returns them."""

    def __init__(self, tokenizer: Tokenizer, eos: int, stops: list[str], most: int, sampler: Sampler):
        self.tokenizer = tokenizer
        self.eos = eos
        self.stops = stops
        self.most = most
        self.sampler = sampler

    def read(self, ids: list[int]) -> tuple[str, bool]:
        """(The text of these ids, whether it is at its end)."""
        ended = ids[-1] == self.eos
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(places, default=None)], ended or bool(places) or len(ids) >= self.most


def generation_of(settings: dict[str, Any]) -> tuple[list[str], int, Sampler]:
    """(Stop texts, most tokens, sampler) that a task's generation_kwargs ask for.

    Raises:
        ConfigError: a value of another type or out of its range.
    """
    try:
        values = normalize_gen_kwargs(settings)
        if wrong := [stop for stop in values["until"] if not isinstance(stop, str)]:
            raise ConfigError(f"until={wrong[0]!r} is not a text")
        if (most := values["max_gen_toks"]) < 1:
            raise ConfigError(f"max_gen_toks={most} must be at least 1")
        sampler = Sampler(temperature=0)
        if values["do_sample"]:
            sampler = Sampler(values.get("temperature", 1.0), values.get("top_k", 0), values.get("top_p", 1.0))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return [stop for stop in values["until"] if stop], most, sampler
