"""The machine that a time was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    """CPU, cores, threads that torch uses, GPU (None without one) and system."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def clocked_on(model: Any) -> dict[str, Any]:
    """What a time of `model` depends on besides the work: `hardware`, the model's device and torch's version.

    The GPU is the one that the model is on; for a model on the CPU it does not matter which GPU the machine has.
    """
    import torch

    device: torch.device = model.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {**hardware(), "gpu": gpu, "device": device.type, "torch": torch.__version__}


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
