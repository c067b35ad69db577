"""Reads and changes the host: links, network namespaces, settings, tracked connections, sockets.

Arguments are plain values: nothing here imports the model or the plan.

`import pyroute2` would import every part of that library.  gangway needs three parts; the others take 8 MB.  So this
module puts the package into sys.modules without running its `__init__`.  That runs later, if a name is needed that is
not a submodule, such as `pyroute2.NDB`: other users of the library in this process find it complete.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def _defer_init(spec: ModuleSpec) -> ModuleType:
    """Return the package of `spec`, whose `__init__` runs when an attribute of it is needed."""
    package = module_from_spec(spec)

    def load(name: str) -> Any:  # called for attributes that are not there (PEP 562)
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)  # asked of every module by `inspect` and `warnings`: no reason to load it
        if find_spec(f"{spec.name}.{name}") is not None:
            return import_module(f"{spec.name}.{name}")
        if vars(package).pop("__getattr__", None):
            assert spec.loader is not None
            spec.loader.exec_module(package)
        return getattr(package, name)

    vars(package)["__getattr__"] = load
    return package


if "pyroute2" not in sys.modules:
    _spec = find_spec("pyroute2")
    assert _spec is not None
    sys.modules["pyroute2"] = _defer_init(_spec)
