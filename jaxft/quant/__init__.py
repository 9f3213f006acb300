"""Kernels in 4 and 8 bits: code books, blockwise quantization, the node that stands in a kernel's place, and its product."""

from jaxft.quant.blockwise import Format, QuantizedKernel, from_bitsandbytes, quantize, to_bitsandbytes

__all__ = ["Format", "QuantizedKernel", "from_bitsandbytes", "quantize", "to_bitsandbytes"]
