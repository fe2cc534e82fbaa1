"""The helpers on another device than the CPU: device_cases.py, in a process of its own."""

import subprocess
import sys
from pathlib import Path


def test_the_helpers_on_another_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "device_cases.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr
