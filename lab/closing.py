"""What a `with` block closes at its end."""

from abc import ABC, abstractmethod
from types import TracebackType


class Closing(ABC):
    """Its subclasses are entered by a `with` block, and closed at the end of it."""

    @abstractmethod
    def close(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
