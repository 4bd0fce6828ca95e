#!/bin/bash
# Train on the cards of one or several hosts to the end of the schedule, then score the weights.
#   bash test/train_full_8p.sh /data/coco [--batch_size=8] [any flag of train.py]
#   NPROC=4 bash test/train_full_8p.sh --data_path=/data/coco --device_id=4 ...
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash test/train_full_8p.sh /data/coco
# --batch_size counts images per card. More in test/ranks.sh.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/ranks.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/ranks.sh"

parse_arguments "$@"
start_case_on_ranks acc
train
leave_if_not_first_host
evaluate_final_weights
report
