"""Makes the corpora of the data ablation: `python -m data_pipeline.ablation output=FOLDER`.

Arguments are Hydra overrides of conf/ablation.yaml. Writes raw/ and cleaned/ with equal numbers of tokens, heldout/,
and corpora.json with their statistics; `python -m launch.ablation` trains on them. A stopped run continues where it
stopped. Exit code 2 with a line per problem for bad input; 1 when a stage of the pipeline fails.
"""

import sys

from data_pipeline.ablation.corpora import make_corpora
from data_pipeline.ablation.settings import AblationSettings
from data_pipeline.cli import command, overrides
from data_pipeline.config import compose_settings


@command
def main(arguments: list[str]) -> None:
    given = overrides("data_pipeline.ablation", __doc__, arguments, AblationSettings)
    settings = compose_settings("ablation", given, AblationSettings)
    summary = make_corpora(settings)
    for name, found in summary["corpora"].items():
        print(f"{name}: {found['documents']} documents, {found['tokens']} tokens, {100 * found['noise']:.1f} % noise")
        if taken := ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in found["taken"].items() if share):
            print(f"  taken before the cut: {taken}")
    heldout = summary["heldout"]
    print(f"heldout: {heldout['documents']} documents, {heldout['tokens']} tokens; {settings.output}/corpora.json")


if __name__ == "__main__":
    sys.exit(main())
