"""Reads and changes the host: links, network namespaces, settings, tracked connections, sockets.

Arguments are plain values: nothing here imports the model or the plan.

`import pyroute2` would import every part of that library.  gangway needs three parts; the others take 8 MB.  So this
module puts the package into sys.modules without running its `__init__`.  That runs later, if a name is needed that is
not a submodule, such as `pyroute2.NDB`: other users of the library in this process find it complete.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any


def _load(name: str) -> Any:  # called for attributes that the package does not have yet (PEP 562)
    assert _spec is not None
    assert _spec.loader is not None
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)  # `inspect` and `warnings` read these of every module: no reason to load it
    if find_spec(f"pyroute2.{name}") is not None:
        return import_module(f"pyroute2.{name}")
    if vars(_package).pop("__getattr__", None):
        _spec.loader.exec_module(_package)
    return getattr(_package, name)


if "pyroute2" not in sys.modules and (_spec := find_spec("pyroute2")) is not None:
    _package = sys.modules["pyroute2"] = module_from_spec(_spec)
    vars(_package)["__getattr__"] = _load
