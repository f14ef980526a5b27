#!/usr/bin/env bash
# Trains one run on several hosts, one process for each GPU. Run the same line on every host:
#
#   RDZV_ENDPOINT=host1:29400 NNODES=2 launch/torchrun.sh --data /data/shards --recipe vit-b16 --out /shared/runs/b16
#
# RDZV_ENDPOINT   where the hosts meet: the name or address of one of them, and a port that is free there
# NNODES          hosts; MIN:MAX goes on with fewer when one is lost, and takes it back when it returns
# NPROC_PER_NODE  processes of this host; gpu (the default) starts one for each GPU
# RDZV_ID         the same on all hosts; a name for each run where several meet at one endpoint
# MAX_RESTARTS    failures after which torchrun gives up; until then it starts all processes again
#
# The run directory (--out) must be on a file system that all hosts share. To go on with a run, start the line again.
# A host that does not know itself by the name in RDZV_ENDPOINT, or whose name leads others to the wrong network:
#   PET_RDZV_CONF=is_host=true (on the host of the endpoint; false on the others), PET_LOCAL_ADDR=its address

set -euo pipefail

: "${RDZV_ENDPOINT:?where do the hosts meet? For example RDZV_ENDPOINT=host1:29400}"
: "${NNODES:?how many hosts are there? For example NNODES=2}"
# After SIGTERM the processes have this many seconds for their checkpoint (torch 2.11 leaves 30 seconds whatever it says).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# Otherwise torchrun does not let a host that was lost come back: it looks in vain for an address of the round before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-poa}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m poa pretrain "$@"
