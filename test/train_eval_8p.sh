#!/bin/bash
# Score weights on the validation set, shared among the cards of this host.
#   bash test/train_eval_8p.sh /data/coco --pth_path=weights/yolact_base_54_100000.pth [any flag of eval.py]
#   NPROC=4 bash test/train_eval_8p.sh --data_path=/data/coco --pth_path=...

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/ranks.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/ranks.sh"

NNODES=1 NODE_RANK=0
parse_arguments "$@"
require_argument pth_path "$pth_path"
start_case_on_ranks eval keep
evaluate "$pth_path" "${flags[@]}"
report
