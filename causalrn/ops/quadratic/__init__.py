"""The quadratic relation and its decoding step: the operators, and their kernels for a CPU, a GPU and plain PyTorch."""
