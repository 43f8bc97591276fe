"""lissom: trained PyTorch models, smaller and measurably faster.

``import lissom`` registers the ops and nothing else: no CUDA, no Triton, no compilation.
"""

from . import compress, formats, nn, ops
from .compress import Report, compress_, explain
from .config import BlockSparse, Int4, Int8
from .io import FormatError, load, save
from .registry import backend_info

__version__ = "0.1.0"

__all__ = [
    "BlockSparse",
    "FormatError",
    "Int4",
    "Int8",
    "Report",
    "__version__",
    "backend_info",
    "compress",
    "compress_",
    "explain",
    "formats",
    "load",
    "nn",
    "ops",
    "save",
]
