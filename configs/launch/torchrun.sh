#!/bin/bash
# Several machines without a scheduler: run this on each of them, with the same first argument.
#   configs/launch/torchrun.sh HOST:PORT NUM_NODES CONFIG [KEY.SUB=VALUE ...]
# HOST is one of the machines, PORT is free there. NUM_NODES may be a range, 2:8: machines may then
# come and go; the ranks start again from the last checkpoint each time.
set -eu

meeting_point=$1
num_nodes=$2
shift 2

# torchrun keeps one store for all its restarts; ranks would find what the last start left in it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=1

exec torchrun \
    --nnodes "$num_nodes" \
    --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$meeting_point" \
    --rdzv-id "${RUN_ID:-latentdiff}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout "${SHUTDOWN_S:-300}" \
    -m latentdiff train --config "$@"
