"""Thin helpers for the notebooks: flat, one noun each. README.md says which module may import which."""

import logging

# bitsandbytes asks for a package that would only speed up the kernel which `chat.close_gradient_trap` avoids
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
