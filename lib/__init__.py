"""Thin helpers for the notebooks: flat, one noun each. README.md says which module may import which."""

import logging
import warnings

from lib import hardware

# bitsandbytes asks for a package that would only speed up the kernel which `chat.close_gradient_trap` avoids
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft still asks transformers by the earlier name of a property, once a layer
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# progress bars are plain text where ipywidgets is missing, which is what the saved notebooks can show
warnings.filterwarnings("ignore", "IProgress not found")
hardware.reuse_memory()  # before any tensor is made
