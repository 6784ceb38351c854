"""Makes the corpus of docs/results.md: `python -m data_pipeline.corpus output=FOLDER`.

Arguments are Hydra overrides of conf/corpus.yaml, which lists packages of Debian and PyPI by version and hash. They are
fetched (output/packages), their documents taken out (output/text), cleaned, deduplicated and tokenised
(output/corpus, by data_pipeline.run with pipeline=packages), and the shards divided into parts that can travel one by
one (output/parts; `python -m data_pipeline.corpus.join` puts them together). corpus.json has sizes and times. A stopped
run continues where it stopped. Exit code 2 with a line per problem for bad input; 1 when a package cannot be downloaded
or a stage of the pipeline fails.
"""

import sys

from data_pipeline.cli import command, overrides
from data_pipeline.config import compose_settings
from data_pipeline.corpus.make import make_corpus
from data_pipeline.corpus.settings import CorpusSettings


@command
def main(arguments: list[str]) -> None:
    given = overrides("data_pipeline.corpus", __doc__, arguments, CorpusSettings)
    settings = compose_settings("corpus", given, CorpusSettings)
    summary = make_corpus(settings)
    for source, found in summary["sources"].items():
        print(f"{source}: " + ", ".join(f"{own['tokens']} tokens in {split}" for split, own in found.items()))
    for number, part in enumerate(summary["parts"], 1):
        print(f"{settings.output}/parts/part-{number}.tar: {part['bytes']} bytes, {part['tokens']} tokens")


if __name__ == "__main__":
    sys.exit(main())
