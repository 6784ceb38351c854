"""Continue a text with a trained model.

python -m megatron_tn.generate checkpoint=runs/demo/checkpoints/latest prompt="def "
"""

from __future__ import annotations

import codecs
import logging
import sys

from megatron_tn.cli import command
from megatron_tn.config import ConfigError, GenerateConfig, out_of_bounds
from megatron_tn.inference.generator import stream
from megatron_tn.inference.sampler import Sampler
from megatron_tn.loading import load_any_model, load_tokenizer

log = logging.getLogger(__name__)


@command(GenerateConfig, "generate", literal=("prompt",))
def main(config: GenerateConfig) -> None:
    sampler = Sampler(config.temperature, config.top_k, config.top_p)
    if problems := [*sampler.problems(), *out_of_bounds(config).values()]:
        raise ConfigError(problems)
    if codecs.lookup(sys.stdout.encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")
        log.warning(
            "standard output takes %s: other characters are printed as \\u escapes; PYTHONIOENCODING=utf-8 prints them",
            sys.stdout.encoding,
        )
    tokenizer = load_tokenizer(config.tokenizer, config.checkpoint)
    model = load_any_model(config.checkpoint, config.device, config.precision)
    tokenizer.encode_special_tokens = not config.special_tokens
    prompt = [model.config.bos_id, *tokenizer.encode(config.prompt, add_special_tokens=False).ids]
    ids = list(prompt[1:])
    shown = ""
    for chosen in stream(model, prompt, max_new_tokens=config.max_new_tokens, sampler=sampler, seed=config.seed):
        ids.append(chosen)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # the bytes of a character may still be coming
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(tokenizer.decode(ids)[len(shown) :] + "\n")


if __name__ == "__main__":
    main()
