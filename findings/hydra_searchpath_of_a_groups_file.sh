#!/usr/bin/env bash
# hydra-core 1.3.8: hydra.searchpath on the command line does not count for the primary config. compose("config",
# ["hydra.searchpath=[file://extra]", "data=short"]) finds extra/data/short.yaml; compose("data/short", with the same
# search path) does not, and prints a search path that holds it.
#
# Guessed: any config on the printed search path can be composed.
# Seen: 16, then MissingConfigException.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/conf/data" "$folder/extra/data"
printf 'defaults:\n  - data: long\n' >"$folder/conf/config.yaml"
echo 'length: 32' >"$folder/conf/data/long.yaml"
echo 'length: 16' >"$folder/extra/data/short.yaml"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check hydra-core==1.3.8 omegaconf==2.3.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import hydra
from hydra.errors import MissingConfigException

path = f"hydra.searchpath=[file://{sys.argv[1]}/extra]"
with hydra.initialize_config_dir(f"{sys.argv[1]}/conf", version_base="1.3"):
    length = hydra.compose("config", [path, "data=short"]).data.length
    try:
        found = hydra.compose("data/short", [path])
    except MissingConfigException as error:
        found = type(error).__name__
print(length, found)
raise SystemExit((length, found) != (16, "MissingConfigException"))
PYTHON
