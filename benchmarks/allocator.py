"""What the C library does with freed memory, made the same for every strategy of a benchmark.

Note [Freed memory]
glibc gives the top of its heap back to the kernel when more than a threshold is free there, and the next forward pass
has every page of its activations mapped and cleared again. Whether that happens hangs on which buffer came to lie above
the activations: the same training took 0 to 30,000 page faults in a step, 0 to 45 ms of 570, by strategy, batch size
and run. Step times are compared without that chance: freed memory stays with the process.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h
LARGEST_FROM_HEAP = 32 << 20  # bytes; the most that mallopt takes
NEVER_TRIMMED = 2**31 - 1


def keep_freed_memory() -> bool:
    """Sets this process's allocator so; False where it is not glibc's, or takes no such settings."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIMMED))
