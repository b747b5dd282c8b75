"""Layers of a packed segment to rows of a paged KV pool and back, on the device.

The GPU twin of Krul's predictive codec, from the point where zstd has been undone on
the host (or is still to be applied). Three steps, each a module with plain-torch
references, the Triton versions of the same signature, and custom ops that choose by
device:

====================  ================================  ================================
module                decode                            encode
====================  ================================  ================================
``symbols``           ``unpack_symbols`` (one a frame)  ``pack_symbols`` (one a frame)
``transform``         ``rebuild_layer``                 ``quantize_layer``
``pool``              ``scatter_layer`` (with RoPE)     ``gather_layer`` (undoes RoPE)
====================  ================================  ================================

``layout`` draws up the tables that say where a frame's symbols lie. Nothing here
waits for the device, and no sum is left to the order in which threads finish. Triton
launches on the thread's current device, which in a helper thread is the first one: the ops
switch to the device of their arguments.
"""

from krul_kernels.packed.layout import FrameLayout, frame_layout
from krul_kernels.packed.pool import gather_layer, scatter_layer
from krul_kernels.packed.symbols import pack_symbols, unpack_symbols
from krul_kernels.packed.transform import quantize_layer, rebuild_layer

__all__ = [
    "FrameLayout",
    "frame_layout",
    "gather_layer",
    "pack_symbols",
    "quantize_layer",
    "rebuild_layer",
    "scatter_layer",
    "unpack_symbols",
]
