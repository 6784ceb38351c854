#!/usr/bin/env bash
# wandb 0.31.0: wandb.init(mode="online", id=ID) raises after settings.init_timeout where the server does not answer. The
# process of wandb's own that it started still has a run ID then: wandb.init(mode="offline", id=ID) in the same program
# raises "run ID ... is in use", and logs once wandb.teardown() has ended that process.
#
# Guessed: after a failed init the same id can be opened offline at once.
# Seen, with an address that nothing listens at:
#   online: CommError; offline: ServerResponseError, in use; offline after teardown: logs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
HOME="$folder" WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY=$(printf 'a%.0s' {1..40}) \
  "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import sys

import wandb


def opened(mode):
    settings = wandb.Settings(silent=True, console="off", init_timeout=5)
    try:
        run = wandb.init(project="p", id="first", mode=mode, dir=sys.argv[1], resume="allow", settings=settings)
    except Exception as error:
        return type(error).__name__ + (", in use" if "is in use" in str(error) else "")
    run.log({"loss": 1.0})
    run.finish()
    return "logs"


found = [opened("online"), opened("offline")]
wandb.teardown()
found.append(opened("offline"))
print("online: {}; offline: {}; offline after teardown: {}".format(*found))
sys.exit(found != ["CommError", "ServerResponseError, in use", "logs"])
PYTHON
