"""Krul inside SGLang 0.5.23. The only package that imports sglang."""

SUPPORTED_SGLANG = "0.5.23"
BACKEND = "krul"
