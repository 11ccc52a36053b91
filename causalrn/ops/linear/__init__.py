"""The linear relation: the operator, and its kernels for a CPU, a GPU and plain PyTorch."""
