"""Byte-pair encoding over characters, with rare characters falling back to their UTF-8 bytes.

Text is not normalised and every character can be encoded, so decoding restores the text exactly. Ids: pad 0, bos 1,
eos 2, unk 3 (never produced), the 256 bytes 4 to 259, then characters and merges.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import InputError
from data_pipeline.files import sha256_of
from data_pipeline.shards.manifest import TokenizerInfo

PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Always in the vocabulary, even if rare in the training corpus (such as tabs).
ASCII = ("\t", "\n", "\r", *map(chr, range(32, 127)))
RESERVED = len(SPECIAL) + len(BYTES)

# Pre-tokenisation pattern: tokens do not cross pieces. For code and prose: a line end and the following indentation are
# one piece, so `:` newline eight spaces is two tokens; a run of spaces is one piece except its last space, which joins
# the next piece; `_` begins a word (`get`, `_name`); numbers are split into at most three digits.
PIECES = "|".join(
    (
        r"[ _]?\p{L}[\p{L}\p{M}]*",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s*\n[ \t]*",
        r"[^\S\n]+(?=[^\S\n]\S)",
        r"\s+",
    )
)
SMALLEST = RESERVED + len(ASCII)
LONGEST_TOKEN = 32  # characters; longer ones are rulers and tables of single files
RAREST_CHARACTER = 10  # minimum occurrences of a character in the vocabulary; rarer ones are encoded as bytes


def train(texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """Trains on `texts()`, which is iterated twice and must yield the same texts; the result depends only on the
    multiset of texts. A small corpus may give fewer than `vocab_size` entries. Raises InputError when `vocab_size` is
    too small for the special entries, bytes and ASCII."""
    if vocab_size < SMALLEST:
        raise InputError(f"tokenizer.vocab_size={vocab_size} is below {SMALLEST}: special entries, 256 bytes, ASCII")
    counts = Counter()
    for text in texts():
        counts.update(text)
    frequent = [item for item in counts.items() if item[1] >= RAREST_CHARACTER and item[0] not in ASCII]
    frequent.sort(key=lambda item: (-item[1], item[0]))
    alphabet = [*ASCII, *(character for character, _ in frequent[: (vocab_size - SMALLEST) // 4])]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    # The trainer's own alphabet breaks ties by hash table order, which differs between runs.
    learner.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size - RESERVED,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            max_token_length=LONGEST_TOKEN,
            show_progress=False,
        ),
    )
    return _with_bytes(json.loads(learner.to_str())["model"])


def _with_bytes(learned: dict) -> Tokenizer:
    """A tokenizer with the special entries, the bytes, then the learned characters and merges."""
    merges = [tuple(merge) for merge in learned["merges"]]
    # A merge equal to a byte token's name would decode to that byte.
    if spelled := [merge for merge in merges if BYTE.fullmatch("".join(merge))]:
        raise InputError(f"tokenizer: merges {spelled} equal the name of a byte token: clean the corpus")
    ordered = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {entry: place for place, entry in enumerate((*SPECIAL, *BYTES, *ordered))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(entry, special=True, normalized=False) for entry in SPECIAL])
    return tokenizer


def load(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, set to encode `</s>` in a text as four characters, not as eos, and every text always
    alike: without truncation, padding, or a BPE's dropout. Raises InputError naming the file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"tokenizer.file={path}: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def describe(path: str | Path, *, bos: str = BOS, eos: str = EOS, pad: str = PAD) -> TokenizerInfo:
    """A manifest's entry for a tokenizer.json; raises InputError when a special entry is missing, or is the encoding of
    its own name in a text."""
    tokenizer, entries = load(path), {"bos": bos, "eos": eos, "pad": pad}
    ids = {name: tokenizer.token_to_id(entry) for name, entry in entries.items()}
    if missing := [name for name, value in ids.items() if value is None]:
        raise InputError(*(f"tokenizer.{name}={entries[name]!r} is no entry of {path}" for name in missing))
    spelled = {name: tokenizer.encode(entry, add_special_tokens=False).ids for name, entry in entries.items()}
    if problems := [
        f"tokenizer.{name}={entries[name]!r}: a text that spells it would have its id {ids[name]}, since {path} does "
        'not list it in added_tokens with "special": true'
        for name in entries
        if ids[name] in spelled[name]
    ]:
        raise InputError(*problems)
    path = Path(path)
    # Not the number of entries, because an existing tokenizer may have unused ids.
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    return TokenizerInfo(file=path.name, sha256=sha256_of(path), vocab_size=vocab_size, **ids)
