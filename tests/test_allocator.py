import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# How many pages the kernel must clear for a tensor of 64 MiB when a larger one was freed just before
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
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
    if HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text(encoding="utf-8"):
        pytest.skip("with huge pages there is little to clear")
    result = subprocess.run([sys.executable, "-c", PROBE, how], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if "unsupported" in result.stderr:
        pytest.skip("the C library has no such limit")
    return int(result.stdout)


def test_a_large_tensor_takes_the_memory_of_one_that_was_freed():
    kept, cleared = new_pages("keep"), new_pages("leave")
    assert kept < 1000 < cleared  # of 4 KiB: all are 16,384
