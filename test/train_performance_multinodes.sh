#!/bin/bash
# train_performance_8p.sh on several hosts, with the flags of ModelZoo's script of this name; start
# it on every host:
#   bash test/train_performance_multinodes.sh --data_path=/data/coco --nnodes=2 --node_rank=0 \
#       --local_addr=10.0.0.1 --master_addr=10.0.0.1 [--master_port=29688] [any flag of train.py]
# --local_addr is this host's address, by which its cards are reached (HCCL_IF_IP). More in
# test/ranks.sh.

declare -A variables=([--nnodes]=NNODES [--node_rank]=NODE_RANK [--local_addr]=HCCL_IF_IP
    [--master_addr]=MASTER_ADDR [--master_port]=MASTER_PORT)
rest=()
while [[ $# -gt 0 ]]; do
    variable=${variables[${1%%=*}]:-}
    if [[ $1 == -h || $1 == --help ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
    elif [[ -z $variable ]]; then
        rest+=("$1")
    elif [[ $1 == *=* ]]; then
        export "$variable=${1#*=}"
    else
        export "$variable=${2:-}"
        shift
    fi
    shift
done
exec bash "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/train_performance_8p.sh" "${rest[@]}"
