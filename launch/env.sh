# shellcheck shell=bash
# Sourced by local.sh, node.sh and train.sbatch: where the project and its Python are, and the environment of a run.
# Every setting gives way to one that is already in the caller's environment.

MEGATRON_TN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The checkout's own .venv (`make setup`); without one, the active Python, for containers that bring everything.
if [ -x "$MEGATRON_TN_ROOT/.venv/bin/python" ]; then
  MEGATRON_TN_PYTHON=$MEGATRON_TN_ROOT/.venv/bin/python
elif ! MEGATRON_TN_PYTHON=$(command -v python3); then
  echo "launch/env.sh: no Python: run \`make setup\` in $MEGATRON_TN_ROOT, or put a python3 on the PATH" >&2
  exit 2
fi
export MEGATRON_TN_ROOT MEGATRON_TN_PYTHON

# Threads of one process's CPU operators: its share of the CPUs that were allocated. torchrun would say 1, which is slow
# for training on CPUs; torch alone would say all of them in every process, which is slower still.
# OMP_NUM_THREADS is part of what makes a CPU run bitwise repeatable: the same allocation gives the same number.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  OMP_NUM_THREADS=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / ${NPROC_PER_NODE:-1}))
  [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1
fi
export OMP_NUM_THREADS

# Lines appear in the log when they are printed, not when a buffer is full: the last ones matter most after a crash.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
# A crash in native code (SIGSEGV, SIGABRT) prints the Python stack that led to it.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}

# A collective that fails or times out ends the process with an error, so that a hang becomes an exit code. 3 is torch's
# own default (abort without cleaning up, which could hang in turn); it is stated because the launch depends on it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# NCCL says what it could not do; by default it fails with nothing but an error number.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Not set here, on purpose: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (NCCL and gloo choose by themselves; on a cluster
# where a node's host name resolves to the wrong network, export them before sbatch), NCCL_IB_* and NCCL_NET_* (the
# site's business), CUDA_DEVICE_MAX_CONNECTIONS (1 helps tensor parallel overlap on some GPUs and hurts FSDP).
