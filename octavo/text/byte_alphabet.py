"""The alphabet of byte-level BPE: each byte as a printable character, its own or else the next one from U+0100 on."""

from __future__ import annotations

__all__ = ["BYTE_OF", "LETTER_OF"]


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}
