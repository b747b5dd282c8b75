"""Krul's tensor operations: plain-torch references and Triton versions.

Needs only torch and (for the Triton versions) triton; nothing of SGLang.
"""
