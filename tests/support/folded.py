"""Small networks for the tests of `doublehead.models.folded`, and how they run without folding."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from doublehead.config import BackboneConfig
from doublehead.models import folded
from doublehead.models.backbone import build_backbone
from doublehead.models.folded import networks

PIXELS = torch.linspace(-2, 2, 2 * 3 * 64 * 96).sin().reshape(2, 3, 64, 96)


def lively(module: nn.Module) -> nn.Module:
    """Statistics and weights of batch norms that are not 0 and 1."""
    random = torch.Generator().manual_seed(0)
    for layer in module.modules():
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = getattr(layer, name, None)
            if hasattr(layer, "running_mean") and tensor is not None:
                tensor.data.uniform_(0.3, 1.2, generator=random).sub_(0.5 if name in ("running_mean", "bias") else 0)
    return module.eval().requires_grad_(False)


def build(name: str = "resnet18", **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"weights": None, "fpn_channels": 16, **options}
    return lively(build_backbone(BackboneConfig(name=name, **options)).body)


@pytest.fixture(name="runs")
def folded_runs(monkeypatch) -> list[torch.dtype]:
    """The dtype of each map that folded networks were run on."""
    found = []

    def watch(original):
        def run(plan, weights, maps, *options, **more):
            found.append((maps if isinstance(maps, Tensor) else maps[0]).dtype)
            return original(plan, weights, maps, *options, **more)

        return run

    for name in ("run_body", "run_steps", "run_proposal_head"):
        monkeypatch.setattr(networks, name, watch(getattr(networks, name)))
    return found


def as_modules(call):
    """The result of the modules themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "may_fold", lambda *_: False)
        return call()


def of_head(head: RPNHead, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of torchvision's head, folded where that is possible."""
    found = folded.rpn_head(head, [head.conv], head.cls_logits, head.bbox_pred, maps)
    return head(maps) if found is None else found
