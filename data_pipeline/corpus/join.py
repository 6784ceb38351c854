"""Puts parts of a corpus together: `python -m data_pipeline.corpus.join FOLDER OUTPUT`.

FOLDER holds one or more of the files part-N.tar that data_pipeline.corpus wrote. OUTPUT/train/manifest.json then lists
the shards of all of them, OUTPUT/heldout/manifest.json the held-out ones, and OUTPUT/pieces/manifest.json the held-out
documents in pieces of --context tokens. The same command adds parts that come later. Exit code 2: there is no part, or
one is damaged or of another corpus.
"""

import sys
from pathlib import Path

from data_pipeline.cli import command, parser
from data_pipeline.corpus.parts import join
from data_pipeline.corpus.pieces import cut
from data_pipeline.errors import InputError


@command
def main(arguments: list[str]) -> None:
    given = parser("data_pipeline.corpus.join", __doc__)
    given.add_argument("folder", type=Path, help="folder that holds part-1.tar, part-2.tar, ...")
    given.add_argument("output", type=Path, help="folder of the joined corpus")
    given.add_argument("--context", type=int, default=2048, help="tokens of a piece, at least 2 (default 2048)")
    options = given.parse_args(arguments)
    if options.context < 2:
        raise InputError(f"--context {options.context} must be at least 2")
    if not (parts := sorted(options.folder.glob("part-*.tar"))):
        raise InputError(f"{options.folder}: no part-*.tar; python -m data_pipeline.corpus output=... makes them")
    manifests = join(parts, options.output)
    manifests["pieces"] = cut(manifests["heldout"], options.context, options.output / "pieces")
    for split, manifest in manifests.items():
        totals = manifest.totals
        print(f"{options.output}/{split}/manifest.json: {totals.documents} documents, {totals.tokens} tokens")


if __name__ == "__main__":
    sys.exit(main())
