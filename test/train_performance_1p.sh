#!/bin/bash
# Measure the training speed on one device, over 2000 steps unless --max_iter says otherwise.
#   bash test/train_performance_1p.sh /data/coco [--fps_start_iter=100] [any flag of train.py]
#   bash test/train_performance_1p.sh --data_path=/data/coco ...

# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$@"
start_case perf
case_flags=(--max_iter=2000)
train
report
