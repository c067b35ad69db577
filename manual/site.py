"""mkdocs' hook: the parts of the site that are not in docs/.

The README is its first page, the benchmark's results are pages, and the marks `<!-- commands -->`, `<!-- settings -->`
and `<!-- operations -->` become the reference tables.  Links lead from docs/ to README.md and bench/ as they do in the
repository; here they are changed to what these have become.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from gangway.daemon.openapi import openapi
from manual import reference

_TOP = Path(__file__).resolve().parents[1]
_PARTS = {
    "commands": reference.commands,
    "settings": reference.settings,
    "operations": reference.operations,
}


def on_files(files: Files, config: Any) -> Files:
    """Add the README, the results, and the API's document."""
    files.append(File.generated(config, "index.md", content=(_TOP / "README.md").read_text()))
    for path in sorted((_TOP / "bench").iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"bench/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "openapi.json", content=json.dumps(openapi(), indent=2)))
    return files


def on_page_markdown(markdown: str, page: Any, **_rest: Any) -> str:
    """Return a page's text with the reference tables, and with links that lead to where things are on the site."""
    for name, part in _PARTS.items():
        mark = f"<!-- {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, part())
    if page.file.src_uri == "index.md":
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./(bench/|README\.md)", lambda found: "](" + found[1].replace("README", "index"), markdown)
