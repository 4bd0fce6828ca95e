#!/bin/bash
# Train on one device to the end of the schedule, then score the weights on the validation set.
#   bash test/train_full_1p.sh /data/coco [--batch_size=8] [--device_id=0] [any flag of train.py]
#   bash test/train_full_1p.sh --data_path=/data/coco ...

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/common.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/common.sh"

parse_arguments "$@"
start_case acc
train
evaluate_final_weights
report
