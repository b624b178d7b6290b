"""How byte-level vocabularies (GPT-2's and later ones) show bytes as printable characters."""

# GPT-2's byte-level alphabet shows a byte as itself where that is printable, else as the next character from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_SHOWN_AS = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


def shown_bytes(token: str) -> bytes:
    """The bytes that a byte-level vocabulary shows as printable characters, or those of a token shown as it is."""
    try:
        return bytes(BYTE_SHOWN_AS[character] for character in token)
    except KeyError:
        return token.encode()
