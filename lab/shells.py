"""Shells on a terminal: what they complete a command line to."""

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_PATIENCE_S = 20.0
_PROMPT = "@@@"
# How each shell is started without anybody's settings, and told about a prompt and the completion of gangway.  What is
# typed is echoed, and must not contain the prompt.
_SHELLS = {
    "bash": (("bash", "--norc", "--noprofile", "-i"), "PS1='@''@@'; source {script}"),
    "zsh": (
        ("zsh", "-f", "-i"),
        "PS1='@''@@'; fpath=({script.parent} $fpath); autoload -Uz compinit; compinit -u -d {folder}/dump",
    ),
    "fish": (("fish", "--no-config", "-i"), "function fish_prompt; echo -n '@''@@'; end; source {script}"),
}


def complete(shell: str, script: Path, typed: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Return the command line that a shell makes of one that was typed when Tab is pressed at its end.

    `script` is the shell's completion of gangway; files are written to `folder`, which is the current directory.
    """
    command, setup = _SHELLS[shell]
    result = folder / "completed"
    result.unlink(missing_ok=True)
    terminal, theirs = pty.openpty()
    with open(terminal, "r+b", buffering=0) as keyboard:
        process = subprocess.Popen(
            ("setsid", "--ctty", *command),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={**environment, "TERM": "dumb", "HOME": str(folder)},
        )
        os.close(theirs)
        try:
            keyboard.write(f"{setup.format(script=script, folder=folder)}\r".encode())
            _read(keyboard.fileno(), lambda shown: _PROMPT in shown, f"{shell}'s prompt")
            # Ctrl-A and Ctrl-E go to the line's beginning and end; zsh would then remove a space that nothing follows.
            keyboard.write(f"{typed}\tX\x01echo '\x05' > part; mv part completed\r".encode())
            _read(keyboard.fileno(), lambda _: result.exists(), f"what {shell} completes")
            return result.read_text().removesuffix("X\n")
        finally:
            process.kill()
            process.wait()


def _read(terminal: int, is_enough: Callable[[str], bool], what: str) -> None:
    """Read what is shown on a terminal until that is enough."""
    shown = ""
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_enough(shown):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: it shows {shown!r}")
        if select.select([terminal], [], [], 0.02)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
