"""The native sources with assertions, and with every access to memory checked, under the tests they have."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = "-DCORAL_DEBUG -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = (
    "drafters/test_native_drafting.py",
    "target/test_forward.py",
    "native/test_sampler.py",
    "native/test_packing.py",
    "target/test_ids.py",
    "native/test_blocks.py",
)


def runtime() -> str | None:
    """The sanitizer's library, which must be loaded before Python; None: this compiler has none."""
    if not (compiler := shutil.which("g++")):
        return None
    asked = [compiler, "-print-file-name=libasan.so"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found if Path(found).is_absolute() else None


@pytest.mark.sanitized
def test_no_access_to_memory_that_is_not_theirs(tmp_path: Path) -> None:
    """Stops a product that reads past the end of a weight, and sizes that Python forgot to check."""
    library = runtime()
    if library is None or sys.platform != "linux":
        pytest.skip("the compiler has no -fsanitize=address")
    environment = {
        **os.environ,
        "CORAL_CXXFLAGS": FLAGS,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:protect_shadow_gap=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not left_to"]
    here = Path(__file__).parents[1]
    files = [str(here / name) for name in TESTS]
    done = subprocess.run(
        [*command, *files], env=environment, cwd=here.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    built = [*(tmp_path / "coral" / "compiled").glob("*.so")]
    assert {path.name.split("-")[0] for path in built} >= {"draft", "forward", "sampler"}
