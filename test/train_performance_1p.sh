#!/bin/bash
# Measure the training speed on one device, over 2000 steps unless --max_iter says otherwise.
#   bash test/train_performance_1p.sh /data/coco [--fps_start_iter=100] [any flag of train.py]
#   bash test/train_performance_1p.sh --data_path=/data/coco ...

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/common.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/common.sh"

parse_arguments "$@"
start_case perf
case_flags=(--max_iter=2000)
train
report
