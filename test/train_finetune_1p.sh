#!/bin/bash
# Train on one device from the weights of a whole network, also one of other classes, then score.
#   bash test/train_finetune_1p.sh /data/own --pth_path=weights/yolact_base_54_800000.pth [any flag of train.py]
#   bash test/train_finetune_1p.sh --data_path=/data/own --pth_path=... --max_iter=5000 --lr=1e-4

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/common.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/common.sh"

parse_arguments "$@"
require_argument pth_path "$pth_path"
start_case acc
case_flags=("--weights=$pth_path")
pth_path=""  # not to be resumed
train
evaluate_final_weights
report
