#!/usr/bin/env bash
# Start a real SLURM on this machine (munged, slurmctld and NODES times slurmd), without systemd and on loopback alone.
#   cluster-up.sh BASE NODES PORT        (root; then `. BASE/env.sh`; cluster-down.sh BASE stops it)
# BASE must be on a local file system and readable by all, as munge insists. The controller listens on PORT, node i on
# PORT + i. TEST_SLURM_PROCTRACK picks how SLURM finds a job's processes: linuxproc (default) signals all of them, where
# cgroup, what most clusters have, signals the tasks alone.
set -euo pipefail
BASE=$(realpath -m "${1:?usage: cluster-up.sh BASE NODES PORT}") NODES=${2:?} PORT=${3:?}
HOST=$(hostname -s)
mkdir -p "$BASE"/{munge,socket,state,spool,log,run}
chmod 755 "$BASE" "$BASE/socket"
chmod 700 "$BASE/munge"
: >"$BASE/pids"
trap '[ $? = 0 ] || "$(dirname "$0")/cluster-down.sh" "$BASE"' EXIT
(umask 077; head -c 128 /dev/urandom >"$BASE/munge/munge.key")

cat >"$BASE/slurm.conf" <<CONF
ClusterName=test
# train.sbatch takes its port from the job: another cluster on this machine, or the next test run, must not share it
FirstJobId=$((PORT + 5000))
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job must wait before it may start again (default 120 s)
AuthInfo=socket=$BASE/socket/munge.socket,cred_expire=5
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool/%n
SlurmctldPidFile=$BASE/run/slurmctld.pid
SlurmdPidFile=$BASE/run/slurmd.%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd.%n.log
# no binding and no look at the real hardware: the virtual nodes share it
ProctrackType=proctrack/${TEST_SLURM_PROCTRACK:-linuxproc}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
# quick reactions
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
MinJobAge=3600
# SLURM's own default: what the trainers have for saving after scancel
KillWait=30
SlurmdTimeout=20
SlurmctldTimeout=20
MessageTimeout=20
UnkillableStepTimeout=60
NodeName=node[1-$NODES] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
cat >"$BASE/cgroup.conf" <<CONF
CgroupAutomount=no
CONF
echo "export SLURM_CONF=$BASE/slurm.conf" >"$BASE/env.sh"
export SLURM_CONF=$BASE/slurm.conf

# MASTER_ADDR is a node's name, which must resolve inside the jobs: every slurmd gets a mount namespace with a copy of
# /etc/hosts that knows the nodes, and a UTS namespace with a host name of its own.
cp /etc/hosts "$BASE/hosts"
chmod 644 "$BASE/hosts"
for i in $(seq "$NODES"); do echo "127.0.0.1 node$i" >>"$BASE/hosts"; done

wait_for() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "timed out: $*" >&2; tail -n 15 "$BASE"/log/* >&2; return 1; }
    sleep 0.2
  done
}
start() { # NAME COMMAND...   (setsid, unshare and bash exec in turn, so $! is the daemon's own PID)
  local name=$1
  shift
  setsid "$@" >"$BASE/log/$name.out" 2>&1 </dev/null &
  echo "$! $name" >>"$BASE/pids"
}
all_idle() { [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" -eq "$NODES" ]; }

start munged munged -F --key-file="$BASE/munge/munge.key" --socket="$BASE/socket/munge.socket" \
  --pid-file="$BASE/munge/munged.pid" --seed-file="$BASE/munge/munged.seed"
wait_for 10 munge -n -S "$BASE/socket/munge.socket"
start slurmctld slurmctld -D -i -f "$SLURM_CONF"
for i in $(seq "$NODES"); do
  mkdir -p "$BASE/spool/node$i"
  # shellcheck disable=SC2016  # for the inner bash to expand
  start "slurmd.node$i" unshare --mount --uts bash -c \
    'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -D -N "$1" -f "$2/slurm.conf"' _ "node$i" "$BASE"
done
wait_for 20 scontrol ping
wait_for 30 all_idle
