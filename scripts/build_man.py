"""Write the manual pages: gangway(1), one of each command, and gangway.toml(5).

    python3 scripts/build_man.py build/man

They are made from the same texts as the help (gangway.cli.manual), and from the commented example of the settings file.
SOURCE_DATE_EPOCH is their date, or else now.  It needs Python's own library only.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_TOP / "src"))

from gangway import __version__  # noqa: E402
from gangway.cli import manual  # noqa: E402
from gangway.cli.commands import COMMANDS  # noqa: E402
from gangway.cli.main import command_parser  # noqa: E402
from gangway.cli.options import SOCKET  # noqa: E402

_SETTINGS = _TOP / "packaging/gangway.toml"
_FLAGS = _TOP / "launcher/flags.c"
_FLAG = re.compile(r'\{ "([a-z-]+)", .*, "(.*)" \},')
_KEY = re.compile(r"#([a-z_-]+) = (.*)")
_EXIT_STATUS = (
    ("0", "The command succeeded."),
    ("1", "It failed, and no changes were made; a line on standard error says why."),
    ("2", "It is invalid: the words, or a value."),
)
_ENVIRONMENT = (
    ("GANGWAY_SOCKET", "The daemon's socket, unless --socket is given."),
    ("NO_COLOR", "If it is not empty, tables on a terminal are plain text."),
)
_FILES = (
    ("/etc/gangway/gangway.toml", "The settings; see gangway.toml(5)."),
    ("/var/lib/gangway/state.db", "The database of the machine's own network namespace."),
    ("/run/gangway/netns-COOKIE/", "The sockets of a network namespace's daemon."),
)


def main() -> None:
    """Write all pages into the folder that was given."""
    folder = Path(sys.argv[1])
    pages = {"man1/gangway.1": overview(), "man5/gangway.toml.5": settings(_SETTINGS.read_text())}
    pages["man1/gangway-docker-proxy.1"] = docker_proxy(_FLAGS.read_text())
    pages |= {f"man1/{page_name(name)}.1": command(name) for name in COMMANDS}
    for name, lines in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))


def page_name(name: str) -> str:
    """Return the name of a command's page."""
    return f"gangway-{name.replace(' ', '-')}"


def overview() -> Iterator[str]:
    """Yield the lines of gangway(1)."""
    yield from _head("gangway", 1, "publish the ports of containers")
    yield from (".SH SYNOPSIS", r".B gangway", r"[\fB\-\-socket\fR \fIPATH\fR] \fICOMMAND\fR ...")
    yield from (".SH DESCRIPTION", *_paragraphs(manual.paragraphs("")))
    yield ".SH COMMANDS"
    for title, section in manual.SECTIONS.items():
        yield f".SS {_text(title)}"
        for name in section:
            yield from (".TP", f".BR {_text(page_name(name))} (1)", _text(manual.summary(name)))
    yield from (".SH OPTIONS", *_option(*SOCKET), ".TP", _bold("--version"), "Show the version of the command.")
    yield from (".TP", f"{_bold('-h')}, {_bold('--help')}", "Show the help, also of each command.")
    yield from _described("ENVIRONMENT", _ENVIRONMENT)
    yield from _described("FILES", _FILES)
    yield from _described("EXIT STATUS", _EXIT_STATUS)
    yield from _see_also("gangway.toml(5)", "gangway-run(1)", "gangway-publish(1)", "gangway-ls(1)", "ip-netns(8)")


def command(name: str) -> Iterator[str]:
    """Yield the lines of a command's page."""
    summary = manual.summary(name).removesuffix(".")
    yield from _head(page_name(name), 1, summary[0].lower() + summary[1:])
    usage = " ".join(command_parser(name).format_usage().split()).removeprefix(f"usage: gangway {name} [-h]")
    yield from (".SH SYNOPSIS", f".B gangway {_text(name)}", _text(usage.strip()) or r"\&")
    yield from (".SH DESCRIPTION", *_paragraphs(manual.paragraphs(name)))
    yield ".SH OPTIONS"
    for names, values in COMMANDS[name][1]:
        yield from _option(names, values)
    for title, rows in manual.tables(name).items():
        yield from _described(title, rows, ".SS")
    yield ".SH EXAMPLES"
    for line, meaning in manual.EXAMPLES[name]:
        yield from (".TP", _bold(line), _text(meaning[0].upper() + meaning[1:] + "."))
    yield from _described("EXIT STATUS", _exit_status(name))
    related = next(section for section in manual.SECTIONS.values() if name in section)
    pages = [f"{page_name(one)}(1)" for one in related if one != name]
    yield from _see_also("gangway(1)", *pages, "gangway.toml(5)")


def settings(text: str) -> Iterator[str]:
    """Yield the lines of gangway.toml(5), from the commented example."""
    yield from _head("gangway.toml", 5, "settings of gangway")
    yield from (".SH SYNOPSIS", r".I /etc/gangway/gangway.toml", ".SH DESCRIPTION")
    head, *blocks = text.strip().split("\n\n")
    yield from (_comment(head.splitlines()), ".PP", "The file is TOML.  The keys of its top level are:")
    for block in blocks:
        lines = block.splitlines()
        if lines[0].startswith("["):
            yield f".SH {_text(f'TABLE {lines.pop(0)}')}"
        keys = [found.groups() for line in lines if (found := _KEY.fullmatch(line))]
        for index, (key, value) in enumerate(keys):
            yield from (".TQ" if index else ".TP", rf"{_bold(key)} = {_text(value)}")
        yield _comment(line for line in lines if not _KEY.fullmatch(line))
    yield from _see_also("gangway(1)", "gangway-config-check(1)", "gangway-daemon(1)", "gangway-daemon-reload(1)")


def docker_proxy(flags: str) -> Iterator[str]:
    """Yield the lines of gangway-docker-proxy(1), from the launcher's table of flags."""
    yield from _head("gangway-docker-proxy", 1, "publish a port for dockerd")
    yield from (".SH SYNOPSIS", r".B gangway\-docker\-proxy", r"[\fIFLAG\fR ...]", ".SH DESCRIPTION")
    yield from _paragraphs(
        [
            "dockerd starts this program for each port that a container publishes, if it is its userland-proxy-path.  "
            "It takes a lease of the port from gangway's daemon, which is started on demand; the relay serves the port "
            "until the program ends.  The flags are those of docker-proxy.",
        ]
    )
    yield from _described("OPTIONS", [(f"-{name}", text.replace(r"\"", '"')) for name, text in _FLAG.findall(flags)])
    yield from _see_also("gangway(1)", "gangway-ls(1)", "gangway-docker-check(1)")


def _exit_status(name: str) -> Iterable[tuple[str, str]]:
    if name == "run":
        return (
            ("N", "The command's exit code, or 128 + N after signal N; 127: there is no such command."),
            *_EXIT_STATUS[1:],
        )
    if name == "docker check":
        return (_EXIT_STATUS[0], ("1", "Something has to be changed, or the command failed."), _EXIT_STATUS[2])
    return _EXIT_STATUS


def _comment(lines: Iterable[str]) -> str:
    return _text(" ".join(line.removeprefix("#").strip() for line in lines))


def _head(name: str, section: int, summary: str) -> Iterator[str]:
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    yield f'.TH {_text(name.upper())} {section} {date} "gangway {__version__}" gangway'
    yield from (".SH NAME", rf"{_text(name)} \- {_text(summary)}")


def _option(names: list[str], values: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an option or argument."""
    metavar = values.get("metavar") or (f"{{{','.join(values['choices'])}}}" if "choices" in values else "")
    if names[0].startswith("-"):
        value = rf" \fI{_text(metavar)}\fR" if metavar else ""
        yield from (".TP", ", ".join(map(_bold, names)) + value)
    else:
        yield from (".TP", rf"\fI{_text(metavar)}\fR")
    yield _text(values["help"])


def _described(title: str, rows: Iterable[tuple[str, str]], macro: str = ".SH") -> Iterator[str]:
    yield f"{macro} {_text(title)}"
    for term, meaning in rows:
        yield from (".TP", _bold(term), _text(meaning))


def _see_also(*pages: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    for index, page in enumerate(pages):
        name, _, section = page.partition("(")
        yield f".BR {_text(name)} ({section}{',' if index < len(pages) - 1 else ''}"


def _paragraphs(texts: list[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        yield from ([".PP"] if index else [])
        yield _text(text)


def _bold(text: str) -> str:
    return rf"\fB{_text(text)}\fR"


def _text(text: str) -> str:
    """Return text that roff prints as it is."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


if __name__ == "__main__":
    main()
