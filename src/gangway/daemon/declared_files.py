"""The files of conf.d, which declare networks and ports.

An operator's files are read only, but for those that `gangway apply` puts there; `kept.toml` is gangway's: what was
published with `--keep`.  So what is declared outlives the database, and all of it can be read, copied to another host
and edited in one place.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gangway import runtime
from gangway.daemon.declaration import Document, document_text, merge, parse_document
from gangway.errors import Conflict, HostRefused, InvalidRequest

KEPT = "kept.toml"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.toml")
_HEAD = "# Ports that were published with --keep. `gangway unpublish` removes them; this file is written again then.\n"


class Files(NamedTuple):
    """What the files say, by their paths, and what is wrong with others: one line each, by their paths, too."""

    documents: dict[str, Document]
    problems: dict[str, str]


class DeclaredFiles:
    """What the files in a folder declare together, since they were read.  One thread changes it, others may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.kept_path = str(folder / KEPT)
        self._use(Files({}, {}))

    @property
    def is_complete(self) -> bool:
        """True unless it is unknown what a file says, or has said."""
        return self.problems.keys() <= self._documents.keys()

    def read(self) -> None:
        self._use(read_files(self._folder, self._documents))

    def forget(self) -> None:
        """Declare nothing, whatever the files say."""
        self.declaration, self.contradictions = merge({})

    def paths(self) -> list[str]:
        """Return the files that declare something."""
        return [path for path, document in self._documents.items() if document != Document()]

    def mistakes(self) -> list[str]:
        """Return what is wrong, line by line."""
        return [*self.problems.values(), *self.contradictions]

    def path_for(self, name: str) -> str:
        """Return the path of a file that `gangway apply` writes.  InvalidRequest: it cannot have that name."""
        if not _NAME.fullmatch(name):
            rule = "use letters, digits, '_', '.' and '-', and .toml at its end"
            raise InvalidRequest(f"invalid file name {name!r}: {rule}")
        if name == KEPT:
            raise InvalidRequest(f"invalid file name {name!r}: gangway publish --keep writes the file of that name")
        return str(self._folder / name)

    def documents_with(self, path: str, document: Document) -> dict[str, Document]:
        """Return what all files say when one says something else."""
        return dict(sorted({**self._documents, path: document}.items()))

    @contextmanager
    def replaced(self, path: str, text: str, document: Document) -> Iterator[None]:
        """Write a file with this text, which says this; if the block fails, restore it.  HostRefused: it cannot be."""
        with written(path, text):
            yield
        problems = {other: problem for other, problem in self.problems.items() if other != path}
        self._use(Files(self.documents_with(path, document), problems))

    def names_networks(self, container: str) -> bool:
        """True if another file than the kept one names a container's networks."""
        others = (document for path, document in self._documents.items() if path != self.kept_path)
        return any(table.network for one in others for table in one.publish if table.container == container)

    def kept(self) -> Document:
        """Return what the kept file says.  Conflict: it is wrong."""
        if self.kept_path in self.problems:
            raise Conflict(self.problems[self.kept_path])
        return self._documents.get(self.kept_path, Document())

    @contextmanager
    def keeping(self, document: Document) -> Iterator[None]:
        """Write the kept file, unless it says that already; if the block fails, restore it."""
        if document == self.kept():
            yield
            return
        tables = document_text(document)
        with self.replaced(self.kept_path, _HEAD + tables if tables else "", document):
            yield

    def _use(self, files: Files) -> None:
        self._documents, self.problems = files
        self.declaration, self.contradictions = merge(files.documents)


def folder_for(settings: str | None) -> Path:
    """Return the folder of a daemon: beside its settings file, or, if none was named, its network namespace's."""
    return Path(settings).absolute().with_name(runtime.DECLARED) if settings else Path(runtime.default_declared())


def read_files(folder: Path, former: Mapping[str, Document]) -> Files:
    """Read all files, in the order of their names; one that is wrong says what it said before, if that is known."""
    documents, problems = dict[str, Document](), dict[str, str]()
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".toml") and not name.startswith("."))
    except FileNotFoundError:
        return Files({}, {})
    except OSError as error:
        return Files(dict(former), {str(folder): f"{folder}: cannot be read: {error.strerror}"})
    for path in (str(folder / name) for name in names):
        try:
            documents[path] = parse_document(_text(path), path)
        except InvalidRequest as error:
            problems[path] = str(error)
            if path in former:
                documents[path] = former[path]
    return Files(documents, problems)


def check_files(folder: Path) -> list[str]:
    """Return what is wrong with files, alone and together, line by line."""
    documents, problems = read_files(folder, {})
    return [*problems.values(), *merge(documents)[1]]


@contextmanager
def written(path: str, text: str) -> Iterator[None]:
    """Write a file, or remove it if the text is empty; if the block fails, restore what was there.

    HostRefused: it cannot be written.
    """
    try:
        before = Path(path).read_bytes()
    except FileNotFoundError:
        before = b""
    except OSError as error:
        raise HostRefused(f"{path} cannot be read: {error.strerror}") from None
    _write(path, text.encode())
    try:
        yield
    except BaseException:
        _write(path, before)
        raise


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from None


def _write(path: str, content: bytes) -> None:
    """Replace a file as a whole, so that a reader, or a power failure, finds the former or the new one."""
    folder, name = os.path.split(path)
    new = os.path.join(folder, f".{name}.new")
    try:
        if not content:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        os.makedirs(folder, 0o755, exist_ok=True)
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(new)
        raise HostRefused(f"{path} cannot be written: {error.strerror}") from None
