"""Reads files of weights safely: nothing in them is executed, and no memory beyond their data is allocated or read.

This package depends on PyTorch and numpy, not on the models.  `read_file` returns the contents of a file, `take_state`
the weights in it, `resnet_state` those of a ResNet; `read_plain` returns everything, like torch.load.
"""

from .entries import State, take_state
from .files import read_file
from .pickles import WeightsError
from .resnets import ResNetState, is_caffe2, resnet_state
from .values import read_plain

__all__ = ["ResNetState", "State", "WeightsError", "is_caffe2", "read_file", "read_plain", "resnet_state", "take_state"]
