"""The tokenizer files of an export, made so that transformers' AutoTokenizer gives the ids of training."""

import json
from pathlib import Path

from megatron_tn.config import ConfigError, ModelConfig

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPECIAL = ("bos", "eos", "pad")


def tokenizer_files(path: Path, config: ModelConfig) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, name -> content, of the tokenizer.json at `path`.

    Training encodes a text without truncation, padding, a BPE's dropout and added entries, and reads the name of a
    special entry in it as the letters that it has; so does the exported tokenizer.

    Raises:
        ConfigError: `path` is damaged; it has more entries than the model's vocabulary; or it lacks an id of the model.
    """
    try:
        content = json.loads(path.read_text())
        names = {place: entry for entry, place in _entries(content)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"tokenizer {path} cannot be read: {type(error).__name__}: {error}") from None
    problems = []
    if (count := 1 + max(names, default=-1)) > config.vocab_size:
        problems.append(f"tokenizer {path} has {count} entries, but model.vocab_size={config.vocab_size}")
    ids = {name: getattr(config, f"{name}_id") for name in SPECIAL}
    problems += [
        f"model.{name}_id={place} is no entry of tokenizer {path}" for name, place in ids.items() if place not in names
    ]
    if problems:
        raise ConfigError(problems)
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in content["model"]:
        content["model"]["dropout"] = None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": names[place] for name, place in ids.items()},
        "split_special_tokens": True,
        "padding_side": "left",  # a recurrent state goes on from the last token of each row
        "clean_up_tokenization_spaces": False,
    }
    return {
        TOKENIZER_FILE: json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        TOKENIZER_CONFIG_FILE: json.dumps(settings, indent=1, ensure_ascii=False) + "\n",
    }


def _entries(content: dict) -> list[tuple[str, int]]:
    """(entry, id) of a tokenizer.json: of its model, and those added to it."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        entries = list(vocabulary.items())
    else:  # a unigram model lists [entry, log probability]
        entries = [(entry, place) for place, (entry, _) in enumerate(vocabulary)]
    return [*entries, *((added["content"], added["id"]) for added in content.get("added_tokens") or [])]
