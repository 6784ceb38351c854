#!/usr/bin/env bash
# The processes of one node: starts torchrun, which starts the trainers, and forwards signals to the trainers.
#   launch/node.sh TORCHRUN_OPTION... -- OVERRIDE...          (called by local.sh, and by train.sbatch once a node)
#
# SIGUSR1 (the time limit is near) and SIGTERM (cancelled; also Ctrl-C and a closed terminal) mean: save a checkpoint and
# stop. torchrun reacts differently: SIGUSR1 kills it, and after SIGTERM it gives its workers 30 s and exits with 1. So
# torchrun and the trainers start with these signals ignored, and this shell signals each trainer once, as soon as the
# trainer has installed its handler: before, it could miss the signal. Trainers keep SIGINT ignored, so Ctrl-C, which a
# terminal sends to all processes, reaches them only as this shell's SIGTERM.
set -euo pipefail

asked='' interrupts=0
trap 'asked=USR1' USR1
trap 'asked=TERM' TERM HUP
trap 'asked=TERM; interrupts=$((interrupts + 1))' INT

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

torchrun_options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do torchrun_options+=("$1"); shift; done
[ $# -gt 0 ] || { echo "launch/node.sh: usage: node.sh TORCHRUN_OPTION... -- OVERRIDE..." >&2; exit 2; }
shift

# torchrun handles SIGQUIT: it ends torchrun at once. -P keeps the current folder off the launcher's module path.
(
  trap '' USR1 TERM HUP INT
  exec "$MEGATRON_TN_PYTHON" -P -m launch.torchrun --signals-to-handle=SIGQUIT "${torchrun_options[@]}" \
    -m megatron_tn.train "$@"
) &
torchrun=$!

trainers() { # prints the PID and the caught-signals mask (hexadecimal) of every child of torchrun
  cat /proc/[0-9]*/status 2>/dev/null |
    awk -v parent="$torchrun" '/^Pid:/{pid = $2} /^PPid:/{ppid = $2} /^SigCgt:/{if (ppid == parent) print pid, $2}'
}

told=' '
tell() { # SIGNAL: send it to the trainers that have a handler and were not signalled yet
  local pid mask bit=$(($(kill -l "$1") - 1))
  while read -r pid mask; do
    [[ $told != *" $pid "* ]] || continue
    (((0x$mask >> bit) & 1)) || continue
    if kill -s "$1" "$pid" 2>/dev/null; then told+="$pid "; fi
  done < <(trainers)
}

announced=''
while kill -0 "$torchrun" 2>/dev/null; do
  if [ -z "$asked" ]; then
    wait "$torchrun" || :  # returns when torchrun ends or this shell gets a signal
  else
    if [ -z "$announced" ]; then
      announced=yes
      echo "launch/node.sh: SIG$asked: telling the trainers to save a checkpoint and stop" >&2
      # train.sbatch does not get signals sent to job steps only; this file tells it not to requeue after SIGTERM
      if [ "$asked" = TERM ] && [ -n "${RUN_MARK:-}" ]; then { : >"$RUN_MARK.terminated"; } 2>/dev/null || :; fi
    fi
    if [ "$interrupts" -ge 2 ]; then  # second Ctrl-C: kill all processes at once
      while read -r pid _; do kill -KILL "$pid" 2>/dev/null || :; done < <(trainers)
      kill -KILL "$torchrun" 2>/dev/null || :
      exit 130
    fi
    tell "$asked"
    sleep 0.5 || :
  fi
done
code=0
wait "$torchrun" || code=$?

# srun reports the largest exit code of all nodes, usually of a node killed after the failure: record the first
if [ "$code" -ne 0 ] && [ -n "${RUN_MARK:-}" ]; then (set -o noclobber; echo "$code" >"$RUN_MARK.failed") 2>/dev/null || :; fi
exit "$code"
