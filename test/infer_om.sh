#!/bin/bash
# Inference on an Ascend card as ModelZoo does it: weights to OM, images to BIN files, ais_bench,
# scores. Needs CANN's atc and ais_bench, unless an exported folder is given.
#   bash test/infer_om.sh /data/coco --pth_path=weights/yolact_base_54_800000.pth [--soc=310P3]
#   bash test/infer_om.sh /data/coco --om_path=exported/model_310P3.om [--batch_size=8]
# Other flags: --batch_size=1 (of the model), --max_images=N.

# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

om_path="" soc=310P3 max_images=-1 batch_size=1

# Take this launcher's own flags out of `flags`.
take_flags() {
    local flag
    for flag in "${flags[@]}"; do
        case $flag in
            --om_path=*) om_path=$(from_caller "${flag#*=}") ;;
            --soc=*) soc=${flag#*=} ;;
            --max_images=*) max_images=${flag#*=} ;;
            --batch_size=*) ;;
            *) echo "[Error] unknown flag $flag; see bash test/infer_om.sh --help" >&2 && exit 2 ;;
        esac
    done
}

step() {  # NAME COMMAND...
    local name=$1 status=0
    shift
    run_logged "$output_path/$name.log" "$@" || status=$?
    [[ $status -eq 0 ]] || fail "$status" "$name" "$output_path/$name.log"
}

parse_arguments "$@"
take_flags
if [[ -z $om_path ]]; then
    require_argument pth_path "$pth_path"
fi
start_case infer keep
rm -rf "${output_path:?}"/{export,bin,results}
if [[ -z $om_path ]]; then
    step export "$PYTHON" -u -m utils.export "$pth_path" --out="$output_path/export" --format=om \
        --soc="$soc" --batch_size="$batch_size"
    om_path=$output_path/export/model_$soc.om
    if [[ ! -e $om_path ]]; then
        echo "[Error] ATC made no $om_path; see $output_path/export.log" >&2
        exit 2
    fi
fi
step preprocess "$PYTHON" -u -m utils.export.offline preprocess "$om_path" \
    --val_data="$data_path" --max_images="$max_images" --out="$output_path/bin"
name_network "$(sed -n 's/^ *"recipe": "\(.*\)",$/\1/p' "$(dirname "$om_path")/model.yaml")"
name_case infer
step ais_bench "$PYTHON" -m ais_bench --model "$om_path" --input "$output_path/bin" \
    --output "$output_path/results" --outfmt BIN --batchsize "$batch_size" \
    --device "$ASCEND_DEVICE_ID"
eval_log=$output_path/score.log
step score "$PYTHON" -u -m utils.export.offline score "$om_path" \
    --val_data="$data_path" --max_images="$max_images" --results="$output_path/results"
FPS=$(sed -n 's/.*throughput .*: *\([0-9.]*\).*/\1/p' "$output_path/ais_bench.log" | tail -n 1)
train_accuracy="box mAP:$(read_accuracy box), mask mAP:$(read_accuracy mask)"
echo "------------------ Final result ------------------"
echo "Final Performance images/sec : ${FPS:-not measured}"
echo "Final Accuracy : $train_accuracy"
{
    echo "Network = $Network"
    echo "BatchSize = $batch_size"
    echo "CaseName = $CaseName"
    echo "ActualFPS = ${FPS:-not measured}"
    echo "TrainAccuracy = $train_accuracy"
} > "$case_file"
