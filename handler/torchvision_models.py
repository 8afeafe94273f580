"""`torchvision.models`, importable beside a CPU-only torch as well.

torchvision's wheel on PyPI is linked against CUDA. Beside a CPU build of torch its compiled operators do not load, and
`import torchvision` fails with "operator torchvision::nms does not exist" although models and transforms need none of
them. Declaring the two schemas that the import looks up is enough. It is done only when the plain import fails.
"""

from __future__ import annotations

import sys

import torch

_declarations: torch.library.Library | None = None  # torch drops the schemas when this object is collected


def _declare_missing_operators() -> None:
    global _declarations
    _declarations = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _declarations.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


try:
    import torchvision.models as models
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # the half-imported package
    _declare_missing_operators()
    import torchvision.models as models

__all__ = ["models"]
