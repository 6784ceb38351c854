"""Push runs that logged offline, or not at all, to wandb: what their wandb runs lack of the journal.

python -m launch.sync runs/7b runs/decay               runs, and folders of runs
python -m launch.sync runs/7b project=paper entity=us  into another project than logging.wandb of the run names

All starts and pushes of a run go to one wandb run, whose id is in run_dir/wandb_id; after a rewind they go to another
one (docs/operations.md). A project that did not exist gets the panels of launch/panels.py as a view (the extra
panels); panels=true adds the view to a project that exists, panels=false to none. Exit code 1 where wandb fails.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.panels import WORKSPACE, workspace
from megatron_tn.cli import of_words
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.plot import runs_in
from megatron_tn.training.hooks.weights_and_biases import log_in, push
from megatron_tn.training.run_folder import RunFolder

OPTIONS = {"project": None, "entity": None, "panels": "new"}


@of_words
def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if word.partition("=")[0] in OPTIONS)
    options = OPTIONS | given
    if options["panels"] not in ("new", "true", "false"):
        raise ConfigError(f"panels={options['panels']} must be true, false or new")
    folders = [word for word in words if word.partition("=")[0] not in OPTIONS]
    runs = [RunFolder(path) for folder in folders for path in runs_in(Path(folder))]
    configs = [_aimed(run.frozen_config(), options["project"], options["entity"]) for run in runs]
    log_in()
    try:
        _push(runs, configs, options["panels"])
    except Exception as error:  # wandb raises many kinds of errors
        sys.exit(f"error: wandb: {type(error).__name__}: {error}")


def _push(runs: Sequence[RunFolder], configs: Sequence[TrainConfig], panels: str) -> None:
    places = dict.fromkeys((config.logging.wandb.entity, config.logging.wandb.project) for config in configs)
    without = [place for place in places if _gets_panels(*place, panels)]
    for run, config in zip(runs, configs, strict=True):
        print(f"{run}: {push(run, config)}", flush=True)
    for entity, project in without:
        _add_panels(entity, project)


def _aimed(config: TrainConfig, project: str | None, entity: str | None) -> TrainConfig:
    wandb = config.logging.wandb
    aimed = dataclasses.replace(wandb, project=project or wandb.project, entity=entity or wandb.entity)
    return dataclasses.replace(config, logging=dataclasses.replace(config.logging, wandb=aimed))


def _gets_panels(entity: str | None, project: str, wanted: str) -> bool:
    """Whether the project gets panels; asked before the first push, which makes the project."""
    import wandb

    if wanted != "new":
        return wanted == "true"
    api = wandb.Api()
    return project not in {found.name for found in api.projects(entity or api.default_entity)}


def _add_panels(entity: str | None, project: str) -> None:
    import wandb

    try:
        view = workspace(entity or wandb.Api().default_entity, project)
    except ImportError as error:
        print(f"no panels: they need the extra panels, pip install -e '.[panels]': {error}", file=sys.stderr)
        return
    view.save()
    print(f"view {WORKSPACE}: {view.url}")


if __name__ == "__main__":
    main()
