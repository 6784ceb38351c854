"""Continuations of fixed prompts during training, to read beside the loss."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from megatron_tn.evaluation.encoding import encode_text
from megatron_tn.inference.rows import generate_shared
from megatron_tn.inference.sampler import Sampler
from megatron_tn.inference.uniform import stream_key
from megatron_tn.model.base import Model

SAMPLER = Sampler(temperature=0.8, top_p=0.95)
ROWS = 16


def continue_texts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int) -> list[dict[str, str]]:
    """[{"prompt": ..., "text": what follows it}]: up to `tokens` tokens, before the model's eos. Prompt n draws its
    random numbers from the key (0, n) at every call; the generators of the process are left alone. Collective."""
    eos, found = model.config.eos_id, [""] * len(prompts)
    ids = [encode_text(tokenizer, model.config.bos_id, prompt).tolist() for prompt in prompts]
    keys = [stream_key(0, number) for number in range(len(prompts))]
    for batch, rows in generate_shared(
        model,
        ids,
        [SAMPLER] * len(ids),
        keys,
        is_done=lambda _, chosen: chosen[-1] == eos or len(chosen) >= tokens,
        rows=ROWS,
    ):
        for number, chosen in zip(batch, rows, strict=True):
            found[number] = tokenizer.decode(chosen[:-1] if chosen[-1] == eos else chosen)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, found, strict=True)]


def prompt_problems(tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, max_length: int) -> list[str]:
    """One line for each of evaluation.prompts that is too long for the model. tokens: evaluation.prompt_tokens.
    max_length: model.max_length; 0: no limit."""
    problems = []
    for number, prompt in enumerate(prompts):
        length = 1 + len(tokenizer.encode(prompt, add_special_tokens=False).ids)  # with bos
        if max_length and length + tokens - 1 > max_length:
            problems.append(
                f"evaluation.prompts[{number}] has {length} tokens with its bos, which with evaluation.prompt_tokens="
                f"{tokens} are more than model.max_length={max_length}"
            )
    return problems
