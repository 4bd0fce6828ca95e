#!/bin/bash
# Measure the training speed on the cards of one or several hosts, over 2000 steps (of the default
# batch size) unless --max_iter says otherwise.
#   bash test/train_performance_8p.sh /data/coco [--fps_start_iter=100] [any flag of train.py]
#   NPROC=4 bash test/train_performance_8p.sh --data_path=/data/coco ...
# --batch_size counts images per card. More in test/ranks.sh.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
# shellcheck source=test/ranks.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/ranks.sh"

parse_arguments "$@"
start_case_on_ranks perf
case_flags=("--max_iter=$((2000 * RANK_SIZE))")  # train.py divides them among the cards
train
leave_if_not_first_host
report
