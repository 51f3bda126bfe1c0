"""Print constraints for the environment that runs this: `.venv-newest/bin/python .ci/freeze.py > constraints.txt`, or
`.venv-lowest/bin/python .ci/freeze.py > constraints-lowest.txt`.

A release that no longer supports our oldest Python is pinned for newer ones only; there pip takes the last that does.
The CUDA libraries are left out: the torch that wants them names their versions itself.
"""

from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OLDEST = 10  # Python 3.10, as in pyproject.toml

print("# Versions for `pip install -c`, see CONTRIBUTING.md. Written by .ci/freeze.py, not by hand.")
for dist in sorted(distributions(), key=lambda dist: canonicalize_name(dist.name)):
    name = canonicalize_name(dist.name)
    if name in ("pip", "tokenprune-vlm") or name.startswith(("nvidia-", "cuda-")):
        continue
    pin = f"{name}=={dist.version.split('+')[0]}"  # a local version such as +cpu is not on PyPI
    supported = SpecifierSet(dist.metadata.get("Requires-Python") or "")
    minors = [minor for minor in range(OLDEST, OLDEST + 10) if f"3.{minor}.99" in supported]
    print(pin if OLDEST in minors else f'{pin}; python_version >= "3.{min(minors)}"')
