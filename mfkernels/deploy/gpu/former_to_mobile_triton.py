from ...operators.former_to_mobile_attention.triton import with_residual as former_to_mobile

__all__ = ["former_to_mobile"]
