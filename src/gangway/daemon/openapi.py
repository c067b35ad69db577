"""The OpenAPI document of the daemon's API, which is generated from its operations."""

import re
from typing import Any

import msgspec

from gangway.daemon.messages import ErrorAnswer
from gangway.daemon.operations import OPERATIONS, Operation

# The version of the API, not of gangway.
_VERSION = "1.0"


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
        "info": {"title": "gangway", "version": _VERSION},
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    def body(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": {"type": "null"} if kind is None else schema[repr(kind)]}}

    path, _, query = operation.pattern.partition("?")
    in_path, in_query = re.findall(r"{(\w+)}", path), re.findall(r"\w+", query)
    text = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, **text} for name in in_path),
            *({"name": name, "in": "query", **text} for name in in_query),
        ],
        "responses": {
            "200": {"description": "OK", "content": body(operation.answer)},
            "default": {"description": "Request failed; no changes were made", "content": body(ErrorAnswer)},
        },
    }
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": body(operation.request)}
    return described
