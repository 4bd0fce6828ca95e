"""Flags of other tools, and what they are called here.

Words of ultralytics, detectron2, mmdetection, torchvision's references, the original YOLACT and
ModelZoo's ports, written with underscores. Those that people type most are names of the flags
themselves, where these are declared.
"""

from __future__ import annotations

from typing import Dict, Mapping

_CARDS = "one process drives one card: NPROC=2 bash test/train_full_8p.sh DATA starts two"
_PLACES = ("--save_folder is the place of weights files, --project and --name that of the run "
           "folder, --log_folder that of logs")
_SHOWN = "images go to files: --image=IN:OUT, --images=FOLDER:OUT, --video=IN:OUT"
_COCO = "results are written in COCO's format: --output_coco_json"


def _by_word(groups: Mapping[str, str]) -> Dict[str, str]:
    """`{"answer": "word word"}` becomes `{"word": "answer", ..}`."""
    return {word: answer for answer, words in groups.items() for word in words.split()}


TRAIN_SAME: Dict[str, str] = _by_word({
    "--accumulate": "accumulation_steps gradient_accumulation_steps accumulate_grad_batches",
    "--batch_size": "batchsize bs samples_per_gpu",
    "--clip_grad_norm": "clip_grad grad_clip max_grad_norm gradient_clip_val",
    "--decay": "wd",
    "--early_stopping": "early_stop early_stopping_patience",
    "--ema": "use_ema model_ema",
    "--epochs": "num_epochs max_epochs total_epochs epoch",
    "--gamma": "lr_gamma",
    "--lr": "base_lr init_lr",
    "--max_iter": "max_iters max_steps num_iters iterations",
    "--max_size": "img img_size image_size input_size",
    "--num_workers": "workers_per_gpu nw",
    "--seed": "random_seed manual_seed",
    "--sync_bn": "syncbn sync_batchnorm",
})
"""Words of the same meaning as a flag of train.py, and that flag."""

TRAIN_INSTEAD: Dict[str, str] = _by_word({
    "--config names a recipe or a file with one, --weights=FILE the network to start from":
        "model model_name arch cfg config_file hyp model_config",
    "--weights=FILE starts from the weights of a network, --resume goes on with a training":
        "pretrained load_from checkpoint ckpt model_path finetune_from init_weights",
    "--backbone_weights=FILE has ImageNet weights":
        "weights_backbone pretrained_backbone backbone_path pretrained_model_path",
    "--resume goes on with the newest training, --resume=FILE with another":
        "resume_from auto_resume continue",
    "--start_iter counts iterations; with --resume and a .state file it is not needed":
        "start_epoch",
    "--set FIELD=VALUE changes a field of the recipe": "cfg_options options opts",
    "--data=FOLDER or --data=FILE.yaml names the data":
        "data_dir data_root dataset_dir root dataset_path",
    _PLACES: "work_dir output_dir output out out_dir save_dir logdir checkpoint_dir model_dir",
    "a run folder's name that is taken gets a number: NAME-2": "exist_ok",
    "weights are written every --save_interval iterations and at the end":
        "save_period save_freq checkpoint_interval checkpoint_period save_epoch",
    "--train_performance and --no_run_folder save nothing": "nosave save",
    "the run folder has the curves; --no_run_folder leaves it out": "plots noplots",
    "a line is printed every ten iterations; --quiet leaves them out":
        "print_freq print_interval log_interval log_freq verbose disp_iter",
    "--opt_level=O1 or O2 computes in half precision":
        "amp half fp16 bf16 use_amp mixed_precision precision",
    "--schedule=cosine, or --schedule=step": "cos_lr lr_scheduler scheduler lr_policy",
    "--set lr_final_factor=0.01 is the end of the cosine as a fraction of --lr": "lrf min_lr",
    "--set lr_steps=ITERATION,.. has the drops of the learning rate":
        "milestones lr_step_size lr_step steps lr_decay_epochs",
    "--set lr_warmup_until=ITERATIONS is the length of the warm-up":
        "warmup warmup_epochs warmup_iters warmup_steps warm_up_epochs",
    "--set lr_warmup_init=RATE is the start of the warm-up":
        "warmup_bias_lr warmup_factor warmup_momentum",
    "--set optimizer=sgd or --set optimizer=adamw": "opt optim optimizer_type",
    "--lr grows with the batch by itself; --no_autoscale turns it off":
        "nbs auto_scale_lr scale_lr autoscale_lr",
    "a batch is given per card: --batch_size": "ims_per_batch global_batch_size total_batch_size b",
    "--num_workers": "j",
    "--set bbox_alpha, conf_alpha and mask_alpha weigh the terms of the loss": "box cls dfl",
    "classes come from the annotation file": "num_classes nc n_classes classes single_cls",
    "augmentation is SSD's: --set augment_photometric=False, and the same for augment_expand, "
    "augment_crop and augment_mirror; --set augment_rotate=True adds quarter turns":
        "augment data_augmentation mosaic close_mosaic mixup cutmix copy_paste use_copypaste "
        "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr flip bgr "
        "auto_augment erasing",
    "the recipes have none": "label_smoothing dropout",
    "runs of the same --seed are equal as far as the device allows":
        "deterministic use_deterministic_algorithms",
    "inputs are squares of --max_size pixels":
        "rect quad aspect_ratio_group_factor preserve_aspect_ratio",
    _CARDS: "gpus gpu_ids num_gpus num_machines machine_rank world_size dist_url dist_backend "
            "backend launcher nproc_per_node nnodes rank rank_size addr ddp distributed "
            "device_list device_num multiprocessing_distributed",
    "--device=npu:0 or --device=cuda:0 chooses a card": "npu gpu gpu_id npu_id use_cuda no_cuda",
    "--validation_epoch=-1 turns validation off": "noval no_validate no_val val validate",
    "--validation_epoch=N validates after every N epochs":
        "eval_interval val_interval eval_period eval_freq check_val_every_n_epoch val_epoch",
    "python eval.py --weights=FILE --data=DATA scores":
        "eval eval_only test test_only evaluate conf iou max_det save_json",
    "images are read anew in every epoch, by --num_workers processes": "cache cache_images",
    "--freeze=backbone, or --freeze=N for its first stages":
        "freeze_backbone freeze_at freeze_layers trainable_backbone_layers frozen_stages",
    "--train_performance measures speed, --max_iter ends it":
        "performance prof profile stop_step_num benchmark",
    "--epochs and --max_iter are the length of a run": "time fraction",
    "its kernels did not pay; the default update is a dozen operators for the whole network and "
    "waits for nothing": "fused_optimizer",
})
"""Words of another meaning than any flag of train.py, or with none here, and what to do."""

EVAL_SAME: Dict[str, str] = _by_word({
    "--batch_size": "batchsize bs",
    "--cross_class_nms": "agnostic_nms",
    "--crops": "save_crop save_crops",
    "--display_bboxes": "show_boxes",
    "--display_scores": "show_conf",
    "--display_text": "show_labels",
    "--max_num_detections": "max_det max_dets detections_per_image",
    "--output_coco_json": "save_json",
    "--score_threshold":
        "conf conf_thres conf_threshold confidence confidence_threshold score_thr score_thresh",
})
"""Words of the same meaning as a flag of eval.py, and that flag."""

EVAL_INSTEAD: Dict[str, str] = _by_word({
    "--weights=FILE names the weights, or an export": "model checkpoint ckpt model_path load_from",
    "--config is the recipe, which the weights bring along": "config_file cfg cfg_options opts",
    _SHOWN: "source input inputs output out out_dir work_dir output_dir save_txt show show_dir "
            "view_img display webcam video_input",
    "videos go to files at their own speed: --video=IN:OUT": "emulate_playback",
    "the input side is that of the weights": "imgsz img img_size image_size max_size",
    "the weights bring nms_thresh along, from the recipe they were trained with":
        "iou iou_thres iou_threshold nms_thresh nms_thr",
    "python -m utils.export WEIGHTS --out=FOLDER exports": "format export opset",
    "the validation split of --data is scored; --valid_images and --valid_info name another":
        "split task data_dir data_root",
    "--run_folder=FOLDER keeps scores and images": "project name exist_ok plots",
    "--precision=float16 or bfloat16 finds objects in half precision":
        "half fp16 bf16 amp opt_level",
    "--display_masks, --display_bboxes, --display_text and --display_scores choose what is drawn":
        "line_width line_thickness hide_labels hide_conf retina_masks visualize",
    "all classes are found; --map_classes scores those that a dataset shares":
        "classes num_classes nc single_cls",
    "each image passes once, as it is": "augment tta",
    "NPROC=2 bash test/train_eval_8p.sh DATA scores on two cards":
        "gpus gpu_ids num_gpus launcher nproc_per_node world_size dist_url",
    "--device=npu:0 or --device=cuda:0 chooses a card": "npu gpu gpu_id npu_id",
    "scores come from COCO's own evaluation: --output_coco_json": "ap_data_file eval metrics",
    "scores come from COCO's own evaluation, which has nothing to resume": "resume",
    _COCO: "output_web_json web_det_path save_hybrid format_only",
    "the viewer of prototypes was not carried over": "display_lincomb mask_proto_debug",
})
"""Words of another meaning than any flag of eval.py, or with none here, and what to do."""
