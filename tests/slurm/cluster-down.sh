#!/usr/bin/env bash
# Stop what cluster-up.sh started, by PID.   cluster-down.sh BASE
set -uo pipefail
BASE=$(realpath "${1:?usage: cluster-down.sh BASE}")
export SLURM_CONF=$BASE/slurm.conf

# the jobs first: SLURM alone knows all their processes
mapfile -t jobs < <(squeue -h -o %A 2>/dev/null | sort -u)
[ "${#jobs[@]}" -eq 0 ] || scancel --signal=KILL --full "${jobs[@]}" 2>/dev/null
[ "${#jobs[@]}" -eq 0 ] || scancel "${jobs[@]}" 2>/dev/null
for _ in $(seq 200); do
  [ -n "$(squeue -h -o %A 2>/dev/null)" ] || break
  sleep 0.2
done

alive() { [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "${2%%.*}" ]; } # that PID is still the daemon we started
stop() { # NAME: TERM all of these at once, wait up to 10 s, KILL what is left
  local pid name
  grep -E " $1(\.|\$)" "$BASE/pids" | while read -r pid name; do alive "$pid" "$name" && kill -TERM "$pid"; done
  grep -E " $1(\.|\$)" "$BASE/pids" | while read -r pid name; do
    for _ in $(seq 100); do
      alive "$pid" "$name" || continue 2
      sleep 0.1
    done
    echo "$name (PID $pid) did not stop: SIGKILL" >&2
    kill -KILL "$pid"
  done
}
stop slurmd
stop slurmctld
stop munged
: >"$BASE/pids"
