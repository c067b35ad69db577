"""The reference pages' tables: every command, every setting, every operation of the API, from where each is defined."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from gangway.cli.commands import COMMANDS
from gangway.cli.main import parse
from gangway.daemon.openapi import openapi
from gangway.daemon.operations import OPERATIONS

_EXAMPLE = Path(__file__).resolve().parents[1] / "packaging/gangway.toml"
_KEY = re.compile(r"#?([a-z_-]+) = (.+)")


def commands() -> str:
    """Return a section for each command, with its help."""
    return "\n".join(f"## gangway {name}\n\n```text\n{help_of(name)}```\n" for name in sorted(COMMANDS))


def help_of(name: str) -> str:
    """Return what `gangway NAME --help` prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), suppress(SystemExit):
        parse([*name.split(), "--help"])
    return printed.getvalue()


def settings() -> str:
    """Return a table for each table of the settings' example."""
    sections = []
    for table, rows in _tables(_EXAMPLE.read_text()):
        lines = (f"| {' '.join(f'`{key} = {value}`' for key, value in keys)} | {what} |" for keys, what in rows)
        title = f"Table `[{table}]`" if table else "Top-level keys"
        sections.append("\n".join([f"## {title}", "", "| key and default | meaning |", "|---|---|", *lines, ""]))
    return "\n".join(sections)


def operations() -> str:
    """Return a table of the API's operations, a section for each, and one for each message."""
    document = openapi()
    roots = {(path, method.lower()) for one in OPERATIONS if one.is_roots for method, path in [one.route]}
    sections = []
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            sections.append(_operation(f"{method.upper()} {path}", described, (path, method) in roots))
    schemas = document["components"]["schemas"]
    return "\n".join([*sections, "## Messages\n", *(_message(name, schemas[name]) for name in sorted(schemas))])


def _tables(text: str) -> Iterator[tuple[str, list[tuple[list[tuple[str, str]], str]]]]:
    """Yield each table of the example: its name, and the keys that share a comment, with their defaults, and that."""
    for table, section in re.findall(r"^(?:\[(\w+)\]\n)?((?:(?!\[).*\n)+)", text, re.MULTILINE):
        rows = []
        for paragraph in section.split("\n\n"):
            lines = paragraph.strip().splitlines()
            keys = [(found[1], found[2]) for line in lines if (found := _KEY.fullmatch(line))]
            comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
            if keys:
                rows.append((keys, comment.replace("|", "\\|")))
        yield table, rows


def _operation(title: str, described: dict[str, Any], is_roots: bool) -> str:
    lines = [f"## {title}", "", described["summary"] + (" Root only." if is_roots else ""), ""]
    query = [one["name"] for one in described["parameters"] if one["in"] == "query"]
    if query:
        lines.append(f"- Query: {', '.join(f'`{name}`' for name in query)}")
    if "requestBody" in described:
        lines.append(f"- Request: {_body(described['requestBody'])}")
    lines += [f"- Answer: {_body(described['responses']['200'])}", ""]
    return "\n".join(lines)


def _body(part: dict[str, Any]) -> str:
    """Return the type of a body; a stream has many of it."""
    ((media, content),) = part["content"].items()
    return _type(content["schema"]) + ("" if media == "application/json" else f", as `{media}`")


def _message(name: str, schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    lines = [f"### {name}", "", *([schema["description"], ""] if "description" in schema else [])]
    lines += ["| field | type | |", "|---|---|---|"]
    for field, kind in schema.get("properties", {}).items():
        lines.append(f"| `{field}` | {_type(kind)} | {'required' if field in needed else _default(kind)} |")
    return "\n".join([*lines, ""])


def _default(kind: dict[str, Any]) -> str:
    return f"default `{json.dumps(kind['default'])}`" if "default" in kind else ""


def _type(schema: dict[str, Any]) -> str:
    """Return a type as a reader names it, with links to messages."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if "additionalProperties" in schema:
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))
