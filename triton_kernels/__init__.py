"""Fused ops between the matmuls of an MoE layer, each a triple: public op, plain-torch twin, Triton kernels.

Imports nothing else of ours. An op is imported from its own module (`from farskip.triton_kernels.route import route`);
importing this package imports neither torch nor triton. docs/kernels.md lists the ops.
"""
