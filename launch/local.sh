#!/usr/bin/env bash
# Train on this machine.  launch/local.sh [-n PROCESSES] [--multirun] OVERRIDE...
#   launch/local.sh model=demo run_dir=runs/first             (one process a GPU; without a GPU, one process)
#   launch/local.sh -n 2 model=demo parallel.tp=2 engine=zero1 run_dir=runs/first
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and stop, with exit code 0; the same command then goes on from there.
# A second Ctrl-C kills. Otherwise the exit code is the trainer's: 2 for a bad configuration.
set -euo pipefail

usage() { echo "launch/local.sh: $1; usage: launch/local.sh [-n PROCESSES] OVERRIDE..." >&2; exit 2; }

processes=''
here=$(dirname "${BASH_SOURCE[0]}")
for word in "$@"; do
  case $word in -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    # shellcheck source=launch/env.sh
    source "$here/env.sh" && exec "$MEGATRON_TN_PYTHON" -P -m megatron_tn.train --help ;;
  esac
done
case ${1:-} in
  -n) [ $# -gt 1 ] || usage "-n needs a number"; processes=$2; shift 2 ;;
  -n*) processes=${1#-n}; shift ;;
esac
[ $# -gt 0 ] || usage "no overrides: say at least model= and run_dir="

if [ -z "$processes" ]; then
  # torch counts, and not nvidia-smi: it respects CUDA_VISIBLE_DEVICES
  # shellcheck source=launch/env.sh
  processes=$(source "$here/env.sh" && "$MEGATRON_TN_PYTHON" -P -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
[[ $processes =~ ^[1-9][0-9]*$ ]] || usage "-n $processes is not a number of processes"

export NPROC_PER_NODE=$processes  # for the share of the CPUs in env.sh
# All processes are here, so gloo's connections need no network; left alone, it looks this machine's host name up, which
# on laptops and in containers fails or leads elsewhere.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
exec "$here/node.sh" --standalone --local-addr=127.0.0.1 --nproc-per-node="$processes" -- "$@"
