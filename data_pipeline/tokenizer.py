"""Byte-pair encoding over characters, with rare characters falling back to their UTF-8 bytes.

Nothing is normalised and every character has a spelling, so decoding gives back the text to the byte. Ids: pad 0,
bos 1, eos 2, unk 3 (never produced), the 256 bytes 4 to 259, then characters and merges.
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
# Always entries of their own, so that a corpus without tabs does not make them cost as much as a rare character.
ASCII = ("\t", "\n", "\r", *map(chr, range(32, 127)))
RESERVED = len(SPECIAL) + len(BYTES)

# Where a token may not reach across. Made for code as much as prose: a line's end and the indentation after it are one
# piece, so that `:` newline eight spaces costs two tokens; a run of spaces is one piece but for the last space, which
# goes with what follows; `_` begins a word (`_name` after `get`); numbers come in at most three digits.
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
LONGEST_TOKEN = 32  # characters: beyond it lie rulers and tables of one file
RAREST_CHARACTER = 10  # occurrences: rarer ones are cheaper as bytes than as an entry


def train(texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """Trains on `texts()`, which is read twice and must give the same each time; the result depends on the multiset of
    texts alone. A small corpus may give fewer than `vocab_size` entries. Raises InputError when `vocab_size` is too
    small to hold what every tokenizer has."""
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
    # The trainer's own choice of an alphabet breaks ties by the order of a hash table, which differs from run to run.
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
    """The learned characters and merges behind the special entries and the bytes."""
    merges = [tuple(merge) for merge in learned["merges"]]
    # A merge that spells a byte's name would decode to that byte.
    if spelled := [merge for merge in merges if BYTE.fullmatch("".join(merge))]:
        raise InputError(f"tokenizer: the corpus taught {spelled}, the name of a byte: clean it or change the pieces")
    ordered = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {entry: place for place, entry in enumerate((*SPECIAL, *BYTES, *ordered))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(entry, special=True, normalized=False) for entry in SPECIAL])
    return tokenizer


def load(path: str | Path) -> Tokenizer:
    """A tokenizer.json, told to read `</s>` in a text as those four characters and not as the end of the document.
    Raises InputError naming the file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for everything
        raise InputError(f"tokenizer.file={path}: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def describe(path: str | Path, *, bos: str = BOS, eos: str = EOS, pad: str = PAD) -> TokenizerInfo:
    """What a manifest records of a tokenizer.json; raises InputError when it lacks one of the special entries."""
    tokenizer = load(path)
    ids = {name: tokenizer.token_to_id(entry) for name, entry in (("bos", bos), ("eos", eos), ("pad", pad))}
    if missing := [name for name, value in ids.items() if value is None]:
        entries = {"bos": bos, "eos": eos, "pad": pad}
        raise InputError(*(f"tokenizer.{name}={entries[name]!r} is no entry of {path}" for name in missing))
    path = Path(path)
    # Not the number of entries: ids of an existing tokenizer may leave some numbers out.
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    return TokenizerInfo(file=path.name, sha256=sha256_of(path), vocab_size=vocab_size, **ids)
