"""Codecs: how the KV of a token run becomes bytes, one file a codec."""
