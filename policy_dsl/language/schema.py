"""The JSON Schema of the YAML form of a policy, for editors and outside checks."""

from __future__ import annotations

from typing import Any

from policy_dsl.language.document import Document


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a policy as YAML; derived from the model.

    It knows keys and types; that statements are well formed only the reader can tell.
    """
    schema = Document.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_titles(schema)}


def _without_titles(value: Any) -> Any:
    if isinstance(value, dict):
        # A title that pydantic makes of a key says nothing that the key does not.
        kept = {
            key: item for key, item in value.items() if key != "title" or not isinstance(item, str)
        }
        return {key: _without_titles(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    return value
