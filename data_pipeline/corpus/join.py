"""Puts parts of a corpus together: `python -m data_pipeline.corpus.join FOLDER OUTPUT`.

FOLDER holds one or more of the files part-N.tar that data_pipeline.corpus wrote. OUTPUT/train/manifest.json then lists
the shards of all of them, and OUTPUT/heldout/manifest.json the held-out ones. The same command adds parts that come
later. Exit code 2: there is no part, or one is damaged or of another corpus.
"""

import sys
from pathlib import Path

from data_pipeline.cli import command, parser
from data_pipeline.corpus.parts import join
from data_pipeline.errors import InputError


@command
def main(arguments: list[str]) -> None:
    given = parser("data_pipeline.corpus.join", __doc__)
    given.add_argument("folder", type=Path, help="holds part-1.tar ...")
    given.add_argument("output", type=Path, help="folder of the joined corpus")
    options = given.parse_args(arguments)
    if not (parts := sorted(options.folder.glob("part-*.tar"))):
        raise InputError(f"{options.folder}: no part-*.tar; python -m data_pipeline.corpus output=... makes them")
    for split, manifest in join(parts, options.output).items():
        totals = manifest.totals
        print(f"{options.output}/{split}/manifest.json: {totals.documents} documents, {totals.tokens} tokens")


if __name__ == "__main__":
    sys.exit(main())
