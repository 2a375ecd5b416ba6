"""Reads files of weights that others wrote: nothing in them is executed, and no memory but what they fill is read.

A leaf: it knows PyTorch and numpy, and nothing of the models.  `read_file` gives what a file holds, `take_state` the
weights in it, `resnet_state` those of a ResNet; `read_plain` gives everything, as torch.load does.
"""

from .entries import State, take_state
from .files import read_file
from .pickles import WeightsError
from .resnets import ResNetState, is_caffe2, resnet_state
from .values import read_plain

__all__ = ["ResNetState", "State", "WeightsError", "is_caffe2", "read_file", "read_plain", "resnet_state", "take_state"]
