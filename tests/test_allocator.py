"""Benchmarks compare step times without the chance of what the C library does with freed memory."""

import resource
import subprocess
import sys

import pytest

from benchmarks.allocator import keep_freed_memory

PROGRAM = """
import sys
from benchmarks.allocator import keep_freed_memory
from tests.test_allocator import faults_of_a_step
if "keep" in sys.argv:
    assert keep_freed_memory()
print(faults_of_a_step())
"""


def faults_of_a_step() -> int:
    """Page faults of the third of three equal steps, each of which allocates 20 MiB and frees it."""

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _activations = [bytearray(1 << 20) for _ in range(20)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return [step() for _ in range(3)][-1]


def faults(*arguments: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_kept_memory_is_not_mapped_again() -> None:
    pages = 20 * 2**20 // resource.getpagesize()
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    if faults() < pages / 2:
        pytest.skip("freed memory is kept here without being told")
    assert faults("keep") < pages / 20
