"""The names that version 0.1.0 offers are still there, under `import` and `import *`."""

import importlib

import pytest

NAMES = {
    "doublehead": "accelerate restore",
    "doublehead.config": "BackboneConfig DataConfig DetectionConfig HeadConfig ImageConfig LossConfig ModelConfig "
    "NonLocalConfig RPNConfig Recipe RoIConfig TrainConfig from_dict to_dict",
    "doublehead.data": "DataError DataWarning DetectionDataset Loader Target build_dataset build_loader "
    "horizontal_flip read_image",
    "doublehead.engine": "CheckpointError Hooks LoadedModel NonFiniteLossError Trainer UserError World evaluate "
    "format_metrics join_world load_model save_model train",
    "doublehead.engine.checkpoint": "load_model save_model",
    "doublehead.engine.errors": "CheckpointError NonFiniteLossError UserError",
    "doublehead.exporting": "ExportedDetections ExportedDetector load",
    "doublehead.interop.detectron2": "accelerate restore",
    "doublehead.interop.mmdet": "accelerate restore",
    "doublehead.interop.torchvision": "convert_faster_rcnn faster_rcnn_config",
    "doublehead.models": "Detections Detector DoubleHeadRCNN ImageBatch Proposals Targets build_detector",
    "doublehead.ops": "BatchNorm MultiScaleRoIAlign NonLocalBlock batch_norm_act batched_nms box_area box_iou "
    "clip_boxes conv_head decode_boxes detections encode_boxes fuse_scores fused_conv image_batch "
    "multiscale_roi_align nms nms_padded non_local roi_align",
    "doublehead.recipes": "RECIPES",
    "doublehead.weights": "ResNetState State WeightsError is_caffe2 read_file read_plain resnet_state take_state",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    names, found = NAMES[module].split(), importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []
    assert sorted(set(names) - set(getattr(found, "__all__", names))) == []
