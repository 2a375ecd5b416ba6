"""The configuration of everything: plain dataclasses, and the one decoder of their values.

This package is a leaf: it imports nothing of the library, so the models, the engine and the
command lines may all read it.  A `Recipe` is complete: together with a data set it says
everything needed to train, evaluate and rebuild a detector.  `to_dict` / `from_dict` carry it
through JSON, which is how a checkpoint remembers it.
"""

from .codec import check, field_names, from_dict, parse, to_dict
from .overrides import override
from .schema import (
    MAX_PIXELS,
    MOST_IMAGES,
    MOST_PIXELS,
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    DataFormat,
    DetectionConfig,
    Fusion,
    HeadConfig,
    HeadKind,
    ImageConfig,
    LossConfig,
    ModelConfig,
    NonLocalConfig,
    Norm,
    Precision,
    ReadOut,
    ReadOutName,
    Recipe,
    RoIConfig,
    RPNConfig,
    TrainConfig,
)

__all__ = [
    "MAX_PIXELS", "MOST_IMAGES", "MOST_PIXELS",
    "AugmentConfig", "BackboneConfig", "DataConfig", "DataFormat", "DetectionConfig", "Fusion", "HeadConfig",
    "HeadKind", "ImageConfig", "LossConfig", "ModelConfig", "NonLocalConfig", "Norm", "Precision", "RPNConfig",
    "ReadOut", "ReadOutName", "Recipe", "RoIConfig", "TrainConfig",
    "check", "field_names", "from_dict", "override", "parse", "to_dict",
]  # fmt: skip
