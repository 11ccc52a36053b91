"""Makes the C library keep freed memory for the next step, where it would return it to the system and fetch it anew."""

import ctypes

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# The most that glibc accepts on a 64-bit system; larger blocks are always mapped apart.
LARGEST_MMAP_THRESHOLD_BYTES = 2**25
# The parameter is an int.
LARGEST_TRIM_THRESHOLD_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps blocks up to 32 MiB in the process; false where the C library knows no such setting (not glibc).

    PyTorch returns each freed CPU tensor to the C library, and glibc returns large ones to the system. Every training
    step then has its activations mapped and zeroed page by page again: for a tensor of 12 MB that took longer than
    the linear relation takes to fill it. The process keeps its peak of such memory until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD_BYTES)
        and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM_THRESHOLD_BYTES)
    )


def return_freed_memory() -> bool:
    """Undoes `keep_freed_memory`: resident memory is then what is held, as benchmarks of memory need it."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, 0)
        library.mallopt(M_MMAP_THRESHOLD, 2**16)
        library.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True
