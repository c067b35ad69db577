"""The OpenAPI document of the daemon's API, which is generated from its operations."""

import re
from typing import Any

import msgspec

from gangway import __version__
from gangway.daemon.messages import ErrorAnswer, HealthAnswer
from gangway.daemon.operations import OPERATIONS, Operation

_ERRORS = {
    400: "The request is invalid.",
    403: "The client may not do this.",
    404: "There is no such path.",
    405: "The path has no such method.",
    409: "The request does not fit the current state, or another program uses a port; no changes were made.",
    413: "The request is too large.",
    417: "The header Expect has an unknown value.",
    500: "The kernel, or one of its tools, refused or failed; no changes were made.",
    501: "The host lacks something that this needs.",
    503: "A tool, or another program's lock, took too long, or too many clients follow events; no changes were made.",
}
"""The statuses of errors.  Each is answered by an ErrorAnswer, whose `kind` is more precise."""


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document (spec.openapis.org/oas/v3.1.0)."""
    types = [kind for operation in OPERATIONS for kind in (operation.answer, operation.request) if kind is not None]
    types.append(ErrorAnswer)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        method, path = operation.route
        paths.setdefault(path, {})[method.lower()] = _described(operation, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gangway", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    def body(kind: Any, media: str = "application/json") -> dict[str, Any]:
        return {media: {"schema": {"type": "null"} if kind is None else schema[repr(kind)]}}

    in_path = re.findall(r"{(\w+)}", operation.pattern)
    text = {"schema": {"type": "string"}}
    media = "text/event-stream" if operation.is_stream else "application/json"
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, **text} for name in in_path),
            *({"name": name, "in": "query", **text} for name in operation.query),
        ],
        "responses": {
            "200": {"description": "OK", "content": body(operation.answer, media)},
            **{str(status): {"description": said, "content": body(ErrorAnswer)} for status, said in _ERRORS.items()},
        },
    }
    if operation.answer is HealthAnswer:
        described["responses"]["503"] = {"description": "It is not healthy.", "content": body(HealthAnswer)}
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": body(operation.request)}
    return described
