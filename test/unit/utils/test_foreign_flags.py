"""Flags of other tools: each is taken for ours, or answered with what there is in its place."""

from __future__ import annotations

import re

import pytest

from helpers.paths import ROOT
from utils.cli import foreign_words
from utils.engine.train_flags import parse_train_flags, train_parser
from utils.inference.eval_flags import eval_parser, parse_eval_flags

PARSERS = {"train": (train_parser, *foreign_words("train")),
           "eval": (eval_parser, *foreign_words("eval"))}

TAKEN = """
train ultralytics  --epochs=3             epochs 3
train ultralytics  --imgsz=320            max_size 320
train ultralytics  --batch=4              batch_size 4
train ultralytics  --device=0             node_device 0
train ultralytics  --device=cpu           node_device cpu
train ultralytics  --workers=3            num_workers 3
train ultralytics  --lr0=0.01             lr 0.01
train ultralytics  --weight_decay=0.01    decay 0.01
train ultralytics  --patience=7           early_stopping 7
train ultralytics  --name=mine            name mine
train ultralytics  --project=there        project there
train ultralytics  --seed=5               seed 5
train yolov5       --img-size=320         max_size 320
train yolov5       --batch-size=4         batch_size 4
train yolov5       --sync-bn              sync_bn True
train torchvision  --data-path=coco       data coco
train torchvision  --lr-gamma=0.2         gamma 0.2
train torchvision  --wd=0.01              decay 0.01
train detectron2   --base_lr=0.01         lr 0.01
train mmdetection  --max-epochs=12        epochs 12
train mmdetection  --local-rank=0         local_rank 0
train modelzoo     --num_epochs=12        epochs 12
train modelzoo     --loss-scale=128       loss_scale 128
train modelzoo     --opt-level=O2         opt_level O2
train modelzoo     --device_id=3          device_id 3
train original     --batch_alloc=8        batch_alloc 8
train original     --learning_rate=0.01   lr 0.01
eval  ultralytics  --batch=8              batch_size 8
eval  ultralytics  --conf=0.3             score_threshold 0.3
eval  ultralytics  --max_det=20           max_num_detections 20
eval  ultralytics  --device=npu:1         eval_device npu:1
eval  ultralytics  --agnostic_nms         cross_class_nms True
eval  ultralytics  --save_json=True       output_coco_json True
eval  ultralytics  --save_crop            crops True
eval  ultralytics  --show_labels=False    display_text False
eval  yolov5       --weights=x.pth        trained_model x.pth
eval  yolov5       --conf-thres=0.3       score_threshold 0.3
eval  mmdetection  --score-thr=0.3        score_threshold 0.3
eval  detectron2   --confidence-threshold=0.3  score_threshold 0.3
eval  original     --trained_model=x.pth  trained_model x.pth
eval  any          --quiet                no_bar True
"""

ANSWERED = """
train ultralytics  --model=yolo11n-seg.pt  --weights=FILE
train ultralytics  --pretrained            --weights=FILE
train ultralytics  --optimizer=AdamW       --set optimizer=
train ultralytics  --cos_lr                --schedule=cosine
train ultralytics  --lrf=0.01              lr_final_factor
train ultralytics  --warmup_epochs=3       lr_warmup_until
train ultralytics  --mosaic=0              augment_photometric
train ultralytics  --fliplr=0.5            augment_mirror
train ultralytics  --save_period=5         --save_interval
train ultralytics  --exist_ok              NAME-2
train ultralytics  --amp=False             --opt_level
train ultralytics  --single_cls            annotation file
train ultralytics  --cache                 --num_workers
train ultralytics  --box=7.5               bbox_alpha
train ultralytics  --val=False             --validation_epoch=-1
train ultralytics  --overlap_mask=False    size of the prototypes
train ultralytics  --evolve                --set FIELD=VALUE
train any          --version               prints the versions
train any          --steps_per_epoch=9     --max_iter
train yolov5       --hyp=hyp.yaml          --config
train yolov5       --noval                 --validation_epoch=-1
train yolov5       --label-smoothing=0.1   have none
train torchvision  -b                      --batch_size
train torchvision  -j                      --num_workers
train torchvision  --opt=sgd               --set optimizer=
train torchvision  --lr-steps=16,22        --set lr_steps
train torchvision  --lr-scheduler=multi    --schedule
train torchvision  --output-dir=out        --save_folder
train torchvision  --print-freq=20         --quiet
train torchvision  --test-only             eval.py
train torchvision  --weights-backbone=x    --backbone_weights
train torchvision  --trainable-backbone-layers=3  --freeze
train torchvision  --world-size=8          train_full_8p.sh
train detectron2   --config-file=x.yaml    --config
train detectron2   --num-gpus=8            train_full_8p.sh
train detectron2   --eval-only             eval.py
train mmdetection  --work-dir=out          --project
train mmdetection  --cfg-options           --set
train mmdetection  --load-from=x.pth       --weights=FILE
train mmdetection  --resume-from=x.pth     --resume
train mmdetection  --no-validate           --validation_epoch=-1
train mmdetection  --launcher=pytorch      train_full_8p.sh
train mmdetection  --gpu-ids=0             train_full_8p.sh
train mmdetection  --auto-scale-lr         --no_autoscale
train modelzoo     --npu=0                 --device=npu:0
train modelzoo     --device-list=0,1       train_full_8p.sh
train modelzoo     --stop-step-num=100     --max_iter
train modelzoo     --evaluate              eval.py
train ours         --fused_optimizer       did not pay
train ours         --nms_thresh=0.6        --set nms_thresh=
eval  ultralytics  --model=x.pt            --weights=FILE
eval  ultralytics  --source=in.jpg         --image=IN:OUT
eval  ultralytics  --iou=0.5               nms_thresh
eval  ultralytics  --imgsz=640             weights
eval  ultralytics  --half                  --precision
eval  ultralytics  --format=onnx           utils.export
eval  ultralytics  --retina_masks          --display_masks
eval  mmdetection  --show-dir=out          --images=FOLDER:OUT
eval  mmdetection  --tta                   once
eval  detectron2   --video-input=x.mp4     --video=IN:OUT
eval  detectron2   --webcam                --video=IN:OUT
eval  original     --display               --image=IN:OUT
eval  original     --ap_data_file=x        --output_coco_json
eval  original     --web_det_path=x        --output_coco_json
eval  original     --emulate_playback      own speed
"""


def cases(text, columns):
    return [tuple(line.split(None, columns - 1)) for line in text.strip().splitlines()]


def test_enough_words_of_other_tools_are_tried():
    assert len(cases(TAKEN, 5)) + len(cases(ANSWERED, 4)) > 90


@pytest.mark.parametrize("program, tool, word, name, value", cases(TAKEN, 5))
def test_a_word_of_the_same_meaning_is_taken(program, tool, word, name, value):
    args = (parse_train_flags if program == "train" else parse_eval_flags)([word])
    assert str(getattr(args, name)) == value


@pytest.mark.parametrize("program, tool, word, answer", cases(ANSWERED, 4))
def test_any_other_word_is_answered_in_a_sentence(program, tool, word, answer, capsys):
    with pytest.raises(SystemExit) as left:
        PARSERS[program][0]().parse_args([word])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    flag = word.split("=")[0]
    assert error.startswith(f"error: {flag} does not exist here: ") and answer in error


@pytest.mark.parametrize("program", PARSERS)
def test_the_tables_name_flags_that_exist(program):
    build, same, instead = PARSERS[program]
    known = {flag for make, _, _ in PARSERS.values() for flag in make()._option_string_actions}
    known |= {"--out"}  # of python -m utils.export
    own = set(build()._option_string_actions)
    assert set(same.values()) <= own
    for word, sentence in instead.items():
        assert set(re.findall(r"--\w+", sentence)) <= known, word
        for script in re.findall(r"test/\w+\.sh", sentence):
            assert (ROOT / script).exists()
    words = [*same, *instead]
    assert len(words) == len(set(words)) and not {f"--{word}" for word in words} & own


def test_words_without_dashes_are_answered_with_the_flag(capsys):
    for word, sentence in (("epochs=10", "did you mean --epochs=10?"),
                           ("imgsz=640", "did you mean --imgsz=640?"),
                           ("model=x.pt", "--weights=FILE"), ("coco", "flags start with --")):
        with pytest.raises(SystemExit):
            train_parser().parse_args([word])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("typed, meant", [
    ("--epohcs", "--epochs"), ("--bach_size", "--batch_size"), ("--img_sz", "--imgsz"),
    ("--validation_epochs", "--validation_epoch"), ("--max_epoch", "--epochs")])
def test_a_typo_still_gets_the_nearest_name(typed, meant, capsys):
    with pytest.raises(SystemExit):
        train_parser().parse_args([typed + "=3"])
    assert capsys.readouterr().err == f"error: unknown flag {typed}; did you mean {meant}?\n"


@pytest.mark.parametrize("typed", ["--fuse_conv_bn", "--dnn", "--bucket", "--entity"])
def test_a_word_like_no_flag_is_not_taken_for_one(typed, capsys):
    with pytest.raises(SystemExit):
        train_parser().parse_args([typed + "=3"])
    assert capsys.readouterr().err == f"error: unknown flag {typed}; --help lists the known ones\n"
