"""Lets PyPI's torchvision be imported beside a torch that was built for CPUs.

vLLM for CPUs pins such a torch and takes torchvision from PyPI, whose operators are built for CUDA and do not load; the
import then fails where it describes two of them. Declaring the two first is enough, because nothing in the tests of
tokenprune inside vLLM uses them. `python torchvision_operators.py` puts this file and a .pth that imports it into the
site-packages of the environment that runs it, if torchvision cannot be imported there, and does nothing else.
"""

import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Declares the operators right before torchvision is looked for, and steps aside."""

    library = None

    def find_spec(self, name, path=None, target=None):
        """Never finds anything."""
        if name == "torchvision" and Finder.library is None:
            sys.meta_path.remove(self)
            import torch

            Finder.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                Finder.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


def install():
    """Copy this file to site-packages where it is needed."""
    import subprocess
    import sysconfig
    from pathlib import Path

    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    site, own = Path(sysconfig.get_paths()["purelib"]), Path(__file__)
    (site / own.name).write_text(own.read_text(encoding="utf-8"), encoding="utf-8")
    (site / f"{own.stem}.pth").write_text(f"import {own.stem}\n", encoding="utf-8")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, Finder())
