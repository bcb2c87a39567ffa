"""Whether every record that was valid yesterday is valid, and understood as much, today."""

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_NO_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_NO_HIGHER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_SAME = ("format", "pattern", "const", "multipleOf", "contentEncoding")


def breaking_changes(old: Mapping[str, Schema], new: Mapping[str, Schema]) -> list[str]:
    """Returns what a producer of the `old` schemas would find refused or lost under the `new` ones; empty: nothing."""
    found = [f"{name}: removed" for name in old if name not in new]
    for name in old.keys() & new.keys():
        found += [f"{name}{change}" for change in _Comparison(old[name], new[name]).changes(old[name], new[name], "")]
    return sorted(found)


class _Comparison:
    def __init__(self, old_root: Schema, new_root: Schema) -> None:
        self._old_defs = old_root.get("$defs", {})
        self._new_defs = new_root.get("$defs", {})

    def changes(self, old: Schema, new: Schema, path: str) -> list[str]:
        """Returns what `old` allows and `new` refuses: each of the old alternatives needs a new one that takes it."""
        found: list[str] = []
        new_alternatives = _alternatives(new, self._new_defs)
        for one in _alternatives(old, self._old_defs):
            attempts: list[list[str]] = [
                self._of_one(one, other, path) for other in new_alternatives if _types(one) <= _types(other)
            ]
            if attempts:
                found += sorted(attempts, key=len)[0]
            else:
                found.append(f"{path}: type {sorted(_types(one))} refused")
        return found

    def _of_one(self, old: Schema, new: Schema, path: str) -> list[str]:
        found: list[str] = []
        if "enum" in new and "enum" not in old:
            found.append(f"{path}: any value narrowed to {new['enum']}")
        elif "enum" in new:
            gone = [value for value in old["enum"] if value not in new["enum"]]
            found += [f"{path}: enum value {value!r} removed" for value in gone]
        found += [f"{path}: {bound} raised" for bound in _NO_LOWER if new.get(bound, _LOW) > old.get(bound, _LOW)]
        found += [f"{path}: {bound} lowered" for bound in _NO_HIGHER if new.get(bound, _HIGH) < old.get(bound, _HIGH)]
        found += [f"{path}: {key} changed" for key in _SAME if key in new and new[key] != old.get(key)]
        found += self._of_object(old, new, path)
        found += self._of_array(old, new, path)
        return found

    def _of_object(self, old: Schema, new: Schema, path: str) -> list[str]:
        old_fields, new_fields = old.get("properties", {}), new.get("properties", {})
        newly_required = set(new.get("required", ())) - set(old.get("required", ()))
        found = [f"{path}.{name}: now required" for name in sorted(newly_required)]
        found += [f"{path}.{name}: removed" for name in old_fields if name not in new_fields]
        for name in old_fields.keys() & new_fields.keys():
            found += self.changes(old_fields[name], new_fields[name], f"{path}.{name}")
        for key, part in (("propertyNames", "names"), ("additionalProperties", "values")):
            if new.get(key, True) is not True:
                found += self.changes(_as_schema(old.get(key, True)), _as_schema(new[key]), f"{path}.{part}")
        return found

    def _of_array(self, old: Schema, new: Schema, path: str) -> list[str]:
        old_heads, new_heads = old.get("prefixItems", []), new.get("prefixItems", [])
        found: list[str] = []
        for index, head in enumerate(new_heads):
            before = old_heads[index] if index < len(old_heads) else old.get("items", True)
            found += self.changes(_as_schema(before), _as_schema(head), f"{path}[{index}]")
        for index in range(len(new_heads), len(old_heads)):
            found += self.changes(old_heads[index], _as_schema(new.get("items", True)), f"{path}[{index}]")
        return found + self._of_rest(old, new, path)

    def _of_rest(self, old: Schema, new: Schema, path: str) -> list[str]:
        # The items behind the fixed ones.
        if new.get("items", True) is True or old.get("items", True) is False:
            return []
        return self.changes(_as_schema(old.get("items", True)), _as_schema(new["items"]), f"{path}[]")


_LOW, _HIGH = float("-inf"), float("inf")
_ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_TYPE_OF = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def _as_schema(schema: Schema | bool) -> Schema:
    if isinstance(schema, bool):
        return {} if schema else {"type": []}
    return schema


def _alternatives(schema: Schema, defs: Mapping[str, Schema]) -> list[Schema]:
    if "$ref" in schema:
        return _alternatives(defs[schema["$ref"].removeprefix("#/$defs/")], defs)
    if "anyOf" in schema:
        return [one for part in schema["anyOf"] for one in _alternatives(part, defs)]
    return [schema]


def _types(schema: Schema) -> frozenset[str]:
    if "type" in schema:
        named = schema["type"]
        types = frozenset([named] if isinstance(named, str) else named)
    elif "enum" in schema:
        types = frozenset(_TYPE_OF[type(value)] for value in schema["enum"])
    else:
        types = _ALL_TYPES
    return types | {"integer"} if "number" in types else types
