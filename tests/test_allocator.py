import subprocess
import sys

import pytest
from conftest import ROOT

# How many pages the kernel must clear for a tensor of 64 MiB when a larger one was freed just before
PROBE = """
import resource, sys, torch
from kindling.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("unsupported")
torch.ones(24 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROBE, how], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if "unsupported" in result.stderr:
        pytest.skip("the C library is not glibc")
    return int(result.stdout)


def test_a_large_tensor_takes_the_memory_of_one_that_was_freed():
    assert new_pages("keep") < 1000  # of 4 KiB; all are 16,384


@pytest.mark.skipif(sys.platform != "linux", reason="says what glibc does")
def test_without_it_the_kernel_clears_every_page_again():
    if new_pages("keep") < 1000:  # on glibc
        assert new_pages("leave") > 1000
