"""The quadratic relation: one operator, and its kernels for a CPU, a GPU and everything else."""
