"""Formats of models other than dcscale's own. Each is a module that ends with its ``Format``.

To add a format, write its module and add a line to ``FORMATS``. A command-line option of its own is declared in
``dcscale.cli.SOURCE_OPTIONS``.
"""

from dcscale.convert.formats import gguf, huggingface, maxtext, transformers, upstream
from dcscale.convert.tensor_map import Format

FORMATS: tuple[Format, ...] = (
    maxtext.FORMAT,
    upstream.FORMAT,
    huggingface.FORMAT,
    transformers.FORMAT,
    gguf.FORMAT,
)
"""In the order in which a folder is compared with them."""
