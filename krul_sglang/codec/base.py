"""The contract every codec keeps, and the KV run they all work on.

Data flow: the runtime gathers a token run's rows into a :class:`KVRun`; a
:class:`Codec` turns it into one self-describing payload (``bytes``); a
:class:`SegmentReader` over that payload yields the layers back in order, each
usable as soon as it is yielded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from krul_sglang.strategy.base import Strategy


Payload = bytes | memoryview


class CodecError(Exception):
    """A payload that cannot be decoded: damaged, truncated, foreign or hostile.

    The only exception a reader raises for bad bytes, within memory bounded by
    the :class:`KVSpec` it was opened with. The caller treats it as a miss.
    """


@dataclass(frozen=True)
class KVSpec:
    """Shape of one token's KV on this rank. ``dtype`` is a torch dtype's name."""

    layers: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of one scalar."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def layer_scalars(self) -> int:
        """Scalars of one token in one layer, K and V."""
        return self.kv_heads * (self.head_dim + self.v_head_dim)

    @property
    def token_bytes(self) -> int:
        """Raw bytes of one token over all layers, K and V."""
        return self.layers * self.layer_scalars * self.itemsize


@dataclass(frozen=True)
class KVRun:
    """K and V of a contiguous run of tokens, as the model's cache holds them.

    k: ``[layers, tokens, kv_heads, head_dim]``, post-RoPE, the pool's dtype, CPU.
    v: ``[layers, tokens, kv_heads, v_head_dim]``, the pool's dtype, CPU.
    start: position of the first token in its sequence, so token ``i`` was
        rotated by RoPE at position ``start + i``.
    """

    k: torch.Tensor
    v: torch.Tensor
    start: int

    @property
    def tokens(self) -> int:
        """Number of tokens in the run."""
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        """Raw bytes of K and V together."""
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()


@dataclass(frozen=True)
class StoredLayer:
    """How a payload holds one layer.

    nbytes: its bytes; of a frame that it shares with other layers a share in proportion to
        what it put there before entropy coding.
    in_shared_frame: whether ``nbytes`` is such a share.
    reference: the layer it is rebuilt from or together with, None where it stands alone.
    dropped: whether nothing is stored but what the reference predicts.
    error: squared error in the importance metric, a token's mean; 0 where the layer is exact,
        None where nothing was measured.
    classes: tokens of each class, the finest first; empty where all are stored alike.
    """

    nbytes: int
    in_shared_frame: bool = False
    reference: int | None = None
    dropped: bool = False
    error: float | None = None
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a payload says of itself; its bytes are ``header_bytes`` and those of the layers.

    step: quantization step of a token of factor 1. factors: of each token class, what its step
        is against that. None and empty for a codec that does not quantize.
    """

    header_bytes: int
    layers: tuple[StoredLayer, ...]
    step: float | None = None
    factors: tuple[float, ...] = ()


class Source(Protocol):
    """Where a payload's bytes come from that are not all in memory yet."""

    tier: str

    def fetch(self, layer: int) -> None:
        """Bring what is needed to read layers up to ``layer``. Raises :class:`CodecError`."""

    def keep(self) -> None:
        """Everything was read and is sound: it may stay in memory."""


class SegmentReader(ABC):
    """An opened payload: what it holds, and its layers in order."""

    tokens: int
    start: int
    source: Source | None = None
    """None where all bytes are in memory."""
    batch_key: Hashable | None = None
    """Readers whose keys are equal (and not None) can be read in one go (:meth:`layers_of`)."""

    def fetch(self, layer: int) -> None:
        """Before layers up to ``layer`` are read: bring their bytes. Raises
        :class:`CodecError`."""
        if self.source is not None:
            self.source.fetch(layer)

    @abstractmethod
    def layers(self, lo: int, hi: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``(k, v)`` of tokens ``[lo, hi)`` for layers ``0 .. L-1``.

        k is ``[hi-lo, kv_heads, head_dim]``, v ``[hi-lo, kv_heads, v_head_dim]``,
        both in the spec's dtype. Raises :class:`CodecError` on damage.
        """

    @abstractmethod
    def layer_bytes(self) -> list[int]:
        """Payload bytes that each layer needs beyond those of the layers below it; they add up
        to the payload, its header counting for layer 0."""

    @abstractmethod
    def describe(self) -> Description:
        """How it is stored, layer by layer. Reads a small part of the payload and checks no
        more than that; raises :class:`CodecError` where even that is damaged."""

    def layers_of(self, parts: Sequence[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`layers`, for the tokens of all ``parts`` side by side.

        The parts' readers have this one's ``batch_key``. A codec that can decode them as one
        run overrides this. Damage does not say in which part it is.
        """
        import torch

        alone = [part.reader.layers(part.lo, part.hi) for part in parts]
        for layer in zip(*alone, strict=True):
            k, v = zip(*layer, strict=True)
            yield (k[0], v[0]) if len(parts) == 1 else (torch.cat(k), torch.cat(v))


class Part(NamedTuple):
    """Tokens ``lo .. hi`` of an opened segment."""

    reader: SegmentReader
    lo: int
    hi: int


def _go_on() -> None:
    pass


class Codec(ABC):
    """Turns runs into payloads and payloads into readers. Stateless and thread-safe."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether every decode is bit-identical to what was encoded."""
    in_order: ClassVar[bool] = True
    """Whether a payload's bytes lie in the order its layers are read in: it can be opened when
    its header is there, and a layer can be read when the bytes up to it are
    (:meth:`SegmentReader.layer_bytes`)."""

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.pace: Callable[[], None] = _go_on
        """Called between an encoding's layers; whoever encodes in the background may let it
        block while there is something more urgent."""

    @abstractmethod
    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        """The payload of ``run``. Does not mutate or keep the run's tensors."""

    @abstractmethod
    def open(self, payload: Payload) -> SegmentReader:
        """Check a payload's header and sizes. Raises :class:`CodecError`."""
