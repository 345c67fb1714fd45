#!/usr/bin/env bash
# Start this node's share of a megarl job with torchrun.
#
#   launch/torchrun.sh train configs/x.yaml key=value ...                               one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh train configs/x.yaml ...  on host0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 launch/torchrun.sh train configs/x.yaml ...  on the second node
#
# Arguments are megarl's own. Run the same command on every node; ranks follow NODE_RANK. From the environment:
#   NNODES          number of nodes (1)
#   NODE_RANK       this node's number, 0 to NNODES-1 (Slurm's SLURM_NODEID where it is set)
#   MASTER_ADDR     name or address of node 0; needed when NNODES > 1
#   MASTER_PORT     a port that is free on node 0 (29500); one node takes any free port by itself
#   NPROC_PER_NODE  ranks on each node (its GPUs; 1 without GPUs)
set -euo pipefail

fail() {
    echo "torchrun.sh: $*" >&2
    exit 2
}
check_number() { # variable, smallest, largest
    if ! [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!1} < $2 || ${!1} > $3)); then
        fail "$1=${!1} is not a number from $2 to $3"
    fi
}

case "${1-}" in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    "") fail "no command; try: launch/torchrun.sh train configs/quickstart.yaml (or --help)" ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python) || fail "no .venv/bin/python here and no python on PATH; run 'make env'"

NNODES=${NNODES:-1}
check_number NNODES 1 100000

if ((NNODES == 1)); then
    rendezvous=(--standalone --local-addr=127.0.0.1)
    [[ ! -e /sys/class/net/lo ]] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # the host's name may mean nothing
else
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
    MASTER_PORT=${MASTER_PORT:-29500}
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the name or address of node 0"
    [[ -n $NODE_RANK ]] || fail "NNODES=$NNODES needs NODE_RANK, this node's number from 0 to $((NNODES - 1))"
    check_number NODE_RANK 0 $((NNODES - 1))
    check_number MASTER_PORT 1 65535
    "$python" -c 'import socket, sys; socket.getaddrinfo(sys.argv[1], None)' "$MASTER_ADDR" 2>/dev/null ||
        fail "MASTER_ADDR=$MASTER_ADDR is not a host this node can find"
    if ((NODE_RANK == 0)); then
        "$python" -c "import socket; socket.create_server(('', $MASTER_PORT))" 2>/dev/null ||
            fail "MASTER_PORT=$MASTER_PORT can't be opened on this node (taken?); set another on every node"
    fi
    # Static rendezvous: global ranks follow NODE_RANK, so rank 0 is on the node named by MASTER_ADDR.
    rendezvous=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
fi
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
check_number NPROC_PER_NODE 1 1000

threads=$(($(nproc) / NPROC_PER_NODE)) # without GPUs more than one a rank would fight each other
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus > 0 && threads > 1 ? threads : 1))}
export PYTHONSAFEPATH=1                                                # a file queue.py here is nobody's library
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}                     # installed or not
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron overlaps through one queue
exec "$python" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" --max-restarts=0 \
    "${rendezvous[@]}" -m megarl.cli "$@"
