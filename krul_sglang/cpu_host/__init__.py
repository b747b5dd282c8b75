"""What SGLang needs in order to start on a machine without an accelerator.

SGLang's PyPI package imports CUDA-only parts at import time. On a CPU-only host
they are stood in for here, from a ``.pth`` file that runs in every Python process
of the environment (SGLang spawns its schedulers, so a wrapper around its main
would not reach them). Nothing here is active where the real parts import.
"""
