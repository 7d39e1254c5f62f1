"""A second formulation of each network, for the exporters of other runtimes.

The definitions of `mfkernels` are written to be read; some runtimes convert them into slow programs. Here the
same networks are written in what every runtime has a fast form of: convolutions with bias, linear layers,
products of matrices, softmax over the last axis and element-wise functions.
"""

from torch import nn

from mfkernels.models.dynamic_mobile_former import DynamicMobileFormer
from mfkernels.models.end_to_end import EndToEndMobileFormer
from mfkernels.models.iformer import IFormer
from mfkernels.models.mobile_former import MobileFormer

from .dynamic_mobile_former import ExportableDynamicMobileFormer
from .end_to_end import ExportableEndToEnd
from .iformer import exportable_iformer
from .mobile_former import ExportableMobileFormer

_FAMILIES = {
    MobileFormer: ExportableMobileFormer,
    DynamicMobileFormer: ExportableDynamicMobileFormer,
    EndToEndMobileFormer: ExportableEndToEnd,
    IFormer: exportable_iformer,
}


def exportable(model: nn.Module) -> nn.Module:
    """Return the second formulation of one of our networks, with a copy of its weights, in eval mode.

    Raises:
        ValueError: another network, or an ablation, of which there is none.
    """
    if type(model) not in _FAMILIES:
        raise ValueError(f"exportable: model must be a network of mfkernels, got {type(model).__name__}")
    return _FAMILIES[type(model)](model).eval()
