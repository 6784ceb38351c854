# shellcheck shell=bash
# Sourced by local.sh, node.sh and train.sbatch: paths of the checkout and of its Python, and a run's environment.
# OMP_NUM_THREADS and the variables below keep values that the caller's environment already has.

MEGATRON_TN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The checkout's own .venv (`make setup`); without it the active Python, for containers with all packages.
if [ -x "$MEGATRON_TN_ROOT/.venv/bin/python" ]; then
  MEGATRON_TN_PYTHON=$MEGATRON_TN_ROOT/.venv/bin/python
elif ! MEGATRON_TN_PYTHON=$(command -v python3); then
  echo "launch/env.sh: no Python: run \`make setup\` in $MEGATRON_TN_ROOT, or put a python3 on the PATH" >&2
  exit 2
fi
export MEGATRON_TN_ROOT MEGATRON_TN_PYTHON

# Threads of a process's CPU operators: allocated CPUs / processes. torchrun would set 1, which is slow for training on
# CPUs; torch's default, all CPUs in every process, is slower still. Bitwise repeatable CPU runs need the same
# OMP_NUM_THREADS, which the same allocation gives.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  # Bash's arithmetic would run commands in a variable: numbers only.
  cpus=${SLURM_CPUS_ON_NODE:-} processes_here=${NPROC_PER_NODE:-}
  [[ $cpus =~ ^[0-9]+$ ]] || cpus=$(nproc)
  [[ $processes_here =~ ^[1-9][0-9]*$ ]] || processes_here=1
  OMP_NUM_THREADS=$((10#$cpus / processes_here))
  [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1
fi
export OMP_NUM_THREADS

# Unbuffered output: the last lines before a crash reach the log.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
# On a crash in native code (SIGSEGV, SIGABRT) Python prints its stack.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}

# A collective that fails or times out ends the process with an error, so that a hang becomes an exit code. 3 is torch's
# own default (abort without cleanup, which could hang in turn), set explicitly because the launchers depend on it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# NCCL logs the cause of a failure, not only an error number.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Deliberately not set: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (NCCL and gloo choose an interface; if a node's host
# name resolves to the wrong network, export them before sbatch), NCCL_IB_* and NCCL_NET_* (specific to a cluster),
# CUDA_DEVICE_MAX_CONNECTIONS (1 helps the overlap of tensor parallelism on some GPUs and hurts FSDP).
