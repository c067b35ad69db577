"""The hands: links, namespaces, settings, tracked connections, sockets.  Plain arguments; no model, no plan.

pyroute2's front imports all that the library can do, a dozen protocols of netlink and a database: 15 MB, of which two
are needed here.  So its package is put in place without its front being run, before anything imports a part of it.
"""

import sys
from importlib.util import find_spec, module_from_spec

if "pyroute2" not in sys.modules:
    _spec = find_spec("pyroute2")
    assert _spec is not None
    sys.modules["pyroute2"] = module_from_spec(_spec)
