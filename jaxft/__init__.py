"""jaxft fine-tunes pre-trained language models in JAX."""

from jaxft import methods
from jaxft.hub.load import load_pretrained
from jaxft.hub.peft import load_adapter, save_adapter
from jaxft.hub.save import save_pretrained
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.methods.partition import combine, partition

__version__ = "0.1.0"
__all__ = [
    "combine",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "methods",
    "partition",
    "save_adapter",
    "save_pretrained",
]
