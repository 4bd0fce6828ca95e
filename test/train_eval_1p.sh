#!/bin/bash
# Score weights on the validation set, on one device.
#   bash test/train_eval_1p.sh /data/coco --pth_path=weights/yolact_base_54_800000.pth [any flag of eval.py]
#   bash test/train_eval_1p.sh --data_path=/data/coco --pth_path=...

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/common.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/common.sh"

parse_arguments "$@"
require_argument pth_path "$pth_path"
start_case eval keep
evaluate "$pth_path" "${flags[@]}"
report
