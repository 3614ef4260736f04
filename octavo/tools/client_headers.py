"""The headers of this program's own requests to a server of OpenAI's API."""

from __future__ import annotations

from octavo.errors import OctavoError

__all__ = ["client_headers"]


def client_headers(api_key: str | None) -> dict[str, str]:
    """Of a request with a JSON body. Raises OctavoError, without the key, for one that no header can hold."""
    headers, key = {"Content-Type": "application/json"}, (api_key or "").strip()  # the server strips its own
    if (place := next((i for i, c in enumerate(key, 1) if not " " <= c <= "~"), None)) is not None:
        raise OctavoError(
            f"The API key's character {place} is U+{ord(key[place - 1]):04X}, and a header holds printable ASCII alone; "
            "look at --api-key or $OPENAI_API_KEY."
        )
    return headers | ({"Authorization": f"Bearer {key}"} if key else {})
