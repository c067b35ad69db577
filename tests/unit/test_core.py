"""The relay's core under sanitizers: `core_driver.c` drives it with real sockets."""

import os
import subprocess
from pathlib import Path

import pytest

_CORE = Path(__file__).parents[2] / "src/gangway/relay/core"
_DRIVER = Path(__file__).with_name("core_driver.c")
_FUZZER = Path(__file__).with_name("core_fuzz.c")
_FUZZED_S = int(os.environ.get("FUZZ_S", "30"))  # more by hand
_FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wl,--wrap=epoll_ctl,--wrap=pipe2", f"-I{_CORE}"]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_driver_finds_no_fault(tmp_path: Path, sanitizers: str) -> None:
    program = tmp_path / "driver"
    sources = [str(path) for path in (*sorted(_CORE.glob("*.c")), _DRIVER)]
    flags = [*_FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, "-o", str(program), *sources], check=True)
    # Addresses are not randomized: some kernels randomize more bits than the runtime of TSan expects.
    ran = subprocess.run(
        ["setarch", "--addr-no-randomize", str(program)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * _FUZZED_S)
def test_fuzzer_finds_no_fault(tmp_path: Path) -> None:
    """Control messages, schedules of a connection, datagrams: libFuzzer makes them up by what they cover."""
    program, corpus = tmp_path / "fuzzer", tmp_path / "corpus"
    corpus.mkdir()
    sources = [str(path) for path in (*sorted(_CORE.glob("*.c")), _FUZZER) if path.name != "datagram.c"]  # included
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-warning-option", f"-I{_CORE}"]
    flags += ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["clang", *flags, "-o", str(program), *sources], check=True)
    command = [str(program), f"-max_total_time={_FUZZED_S}", "-timeout=60", str(corpus)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert any(corpus.iterdir())
