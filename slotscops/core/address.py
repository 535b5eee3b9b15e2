"""Where a data set lies: a folder or a URL, of which nothing secret can be printed or stored by mistake.

A URL may hold a password (`https://user:password@host/horse`) or a signed query (`https://host/horse?sig=...`). Text
made of an `Address` has `***` in their place. Only `reveal` gives the whole.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote

from pydantic_core import CoreSchema, core_schema

HIDDEN = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://[^\s'\"<>]+")
_QUERY_VALUE = re.compile(r"(?<==)[^&;]*")
_SHORTEST_SECRET = 4  # characters; shorter ones are no secrets, and hiding them would make messages unreadable


def hide_secrets(text: str) -> str:
    """The text with `***` in place of user names, passwords and values of queries in all URLs in it."""
    return _URL.sub(lambda found: _without_secrets(found[0]), text) if "://" in text else text


def _without_secrets(url: str) -> str:
    """The URL without user info and values of its query and fragment; a malformed one keeps its scheme only."""
    scheme, rest = url.split("://", 1)
    if not any(mark in rest for mark in "@?#"):
        return url
    place, *behind = re.split(r"([?#])", rest, maxsplit=1)
    host, slash, path = place.partition("/")
    host = host.rpartition("@")[2]
    # A password with / or ? in it would otherwise lie where a path or a query is. Brackets hold an IPv6 address.
    has_host = re.fullmatch(r"[^:\[\]]*(:\d*)?|\[[0-9A-Fa-f:.]*\](:\d*)?", host)
    if not has_host or "://" in rest or (":" in host and not slash and "@" in "".join(behind)):
        return f"{scheme}://{HIDDEN}"
    user = f"{HIDDEN}@" if "@" in place.partition("/")[0] else ""
    return f"{scheme}://{user}{host}{slash}{path}{_hide_query(behind)}"


def _hide_query(behind: list[str]) -> str:
    if not behind:
        return ""
    mark, query = behind
    pairs = re.split(r"[&;#]", query)
    names = [pair.partition("=")[0] for pair in pairs if "=" in pair]
    if len(names) < len(pairs):  # a query without names may be the secret itself
        return f"{mark}{HIDDEN}"
    return mark + "&".join(f"{name}={HIDDEN}" for name in names)


class Address:
    """A folder or a URL. `str`, `repr`, `format` and what settings are written as hide its secrets.

    Two addresses are equal if they are the same with their secrets.
    """

    __slots__ = ("_whole",)

    def __init__(self, whole: "str | Path | Address") -> None:
        self._whole: str = whole._whole if isinstance(whole, Address) else str(whole)

    def reveal(self) -> str:
        """The whole address, for whoever opens it."""
        return self._whole

    def __str__(self) -> str:
        return _without_secrets(self._whole) if self.is_remote else self._whole

    def __repr__(self) -> str:
        return repr(str(self))

    def __eq__(self, other: object) -> bool:
        return self._whole == (other._whole if isinstance(other, Address) else other)

    def __hash__(self) -> int:
        return hash(self._whole)

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL."""
        return "://" in self._whole

    @property
    def has_secret(self) -> bool:
        """Whether something of it is hidden."""
        return str(self) != self._whole

    @property
    def lost_secret(self) -> bool:
        """Whether it was read from a file that was written without its secret."""
        return self.is_remote and HIDDEN in self._whole

    @property
    def name(self) -> str:
        """The last component of its path, which tells nobody where it lies."""
        if not self.is_remote:
            return Path(self._whole).name
        place = re.split("[?#]", str(self).split("://", 1)[1])[0]
        name = PurePosixPath(place.partition("/")[2]).name
        return name if name and HIDDEN not in name else "shards"

    def identity(self) -> str:
        """What tells data sets apart: the address without the user, who may change."""
        return re.sub(r"://[^/?#]*@", "://", self._whole)

    def file(self, name: str) -> "Address":
        """The address of a file of the folder; a query stays behind the path."""
        place, mark, query = self._whole.partition("?") if self.is_remote else (self._whole, "", "")
        return Address(f"{place.rstrip('/')}/{name}{mark}{query}")

    def clean(self, text: str) -> str:
        """A message of another library about this address, without its secrets."""
        for secret in sorted(self._secrets(), key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return hide_secrets(text)

    def _secrets(self) -> set[str]:
        """User name, password and values of the query, as they are and decoded."""
        if not self.has_secret:
            return set()
        user = self._whole.split("://", 1)[1].partition("/")[0].rpartition("@")[0]
        query = self._whole.partition("?")[2]
        values = [user, user.partition(":")[2], *_QUERY_VALUE.findall(query), *(v for _, v in parse_qsl(query))]
        return {s for value in values for s in (value, unquote(value)) if len(s) >= _SHORTEST_SECRET}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.union_schema([core_schema.str_schema(strict=True), core_schema.is_instance_schema(cls)]),
            serialization=core_schema.to_string_ser_schema(),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string"}
