"""keep_freed_memory: what it saves can be counted, as page faults."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_MESSAGES = """
import resource, sys
from nnserver.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for size in (3_000_000, 100_000, 3_000_000):
    bytearray(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    message = bytearray(3_000_000)
    answer = bytes(message)
    del message, answer
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_messages_of_megabytes_cost_no_page_faults():
    """A hundred messages of 3 MB and their copies: by default each page of each is faulted in anew."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS_OF_MESSAGES, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("as it is") > 100 * faults("kept")
