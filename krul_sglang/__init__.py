"""Krul for SGLang: bring a conversation's KV cache back, smaller and sooner.

Importing this package needs neither torch nor sglang; what needs them imports
them where it is used.
"""

__version__ = "0.1.0"
