"""The operations of a block on CUDA devices: cuBLAS, Triton kernels, CUDA graphs."""
