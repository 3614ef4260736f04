"""GET /openapi.json and /docs, made from the table of routes: whatever route is added there appears here."""

from __future__ import annotations

import html
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from octavo.server.http import JsonEndpoint
from octavo.version import __version__

__all__ = ["describing_routes", "openapi"]

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_JSON: dict[str, Any] = {"application/json": {"schema": {}}}
_STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td,th{text-align:left;padding-right:1.5em}"


def describing_routes(routes: Sequence[BaseRoute]) -> list[Route]:
    """The routes of /openapi.json and /docs, which describe `routes`. The description is made when it is first asked for."""
    made: dict[str, Response] = {}

    async def as_json(_: Request) -> Response:
        if "json" not in made:
            made["json"] = JSONResponse(openapi(routes))
        return made["json"]

    async def as_page(_: Request) -> Response:
        if "page" not in made:
            made["page"] = HTMLResponse(_page(openapi(routes)))
        return made["page"]

    return [Route("/openapi.json", as_json), Route("/docs", as_page)]


def openapi(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of `routes`: bodies by the pydantic models of their JsonEndpoints."""
    known = [route for route in routes if isinstance(route, Route)]
    models = {route.endpoint.model: None for route in known if isinstance(route.endpoint, JsonEndpoint)}
    references, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas = {**definitions.get("$defs", {}), "Error": _ERROR}
    bodies = {model: reference for (model, _), reference in references.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route in known:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, path, method, bodies)
    info = {"title": "Octavo", "version": __version__, "description": "Language models in FP8, with OpenAI's and vLLM's API."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _operation(route: Route, path: str, method: str, bodies: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"\{(\w+)\}", path)
    ]
    queries: Mapping[str, Any] = getattr(route.endpoint, "parameters", {})
    parameters += [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in queries.items()]
    found: dict[str, Any] = {
        "operationId": f"{method.lower()}_{re.sub('[^a-z0-9]+', '_', path.lower()).strip('_')}",
        "responses": {
            "200": {"description": "The answer.", "content": dict(_JSON)},
            "default": {
                "description": "What was wrong, in a sentence.",
                "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
            },
        },
    }
    if parameters:
        found["parameters"] = parameters
    if isinstance(route.endpoint, JsonEndpoint):
        model = route.endpoint.model
        found["summary"] = (inspect.getdoc(model) or path).splitlines()[0]
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": bodies[model]}}}
        if "stream" in model.model_fields:
            found["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return found


def _page(described: Mapping[str, Any]) -> str:
    """The description as a page without scripts."""
    schemas, parts = described["components"]["schemas"], []
    for path, methods in described["paths"].items():
        for method, one in methods.items():
            parts.append(f"<h2 id={one['operationId']}><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(one.get('summary', ''))}</p>")
            fields = {parameter["name"]: parameter["schema"] for parameter in one.get("parameters", ())}
            if "requestBody" in one:
                name = one["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                fields |= schemas[name].get("properties", {})
            rows = "".join(f"<tr><td><code>{html.escape(name)}</code><td>{_kind(schema)}" for name, schema in fields.items())
            parts.append(f"<table>{rows}</table>" if rows else "")
    title = f"Octavo {described['info']['version']}"
    links = '<p>The same for programs: <a href="openapi.json">openapi.json</a></p>'
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    return head + links + "".join(parts)


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema's type, in words."""
    if "$ref" in schema:
        return f"object {html.escape(schema['$ref'].rpartition('/')[2])}"
    if options := schema.get("anyOf"):
        return " or ".join(_kind(one) for one in options if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return html.escape(", ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return html.escape(str(schema.get("type", "any")))
