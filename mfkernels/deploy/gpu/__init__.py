"""Networks as CUDA graphs, with fused blocks."""
