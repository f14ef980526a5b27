"""Everything that needs a GPU, in one call: the device tests, then one training step of each architecture.

    PYTHONPATH=src python benchmarks/gpu.py OUT

Writes OUT/tests.log and OUT/step-RECIPE-{plain,compiled}.json; exit status 0 if all went well.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

RECIPES = ("vit-s16", "swin-t", "resnet50")
MODES = (("plain", "off"), ("compiled", "on"))


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    everything = "slow or not slow"
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        everything,
        "tests/integration/test_devices.py",
        "tests/integration/test_evaluate_devices.py",
        "tests/integration/test_profile_cli.py",
        "tests/golden",
    ]
    with (out / "tests.log").open("w", encoding="utf-8") as log:
        failed = subprocess.run(tests, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    print((out / "tests.log").read_text(encoding="utf-8")[-2000:])
    for recipe, (name, mode) in itertools.product(RECIPES, MODES):
        print(f"\none step of {recipe}, {name}:", flush=True)
        command = [sys.executable, "benchmarks/step.py", "--recipe", recipe, "--device", "cuda", "--compile", mode]
        failed |= subprocess.run([*command, "--json", str(out / f"step-{recipe}-{name}.json")], check=False).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
