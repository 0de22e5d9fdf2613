"""`python -m lib`: the runner, `lib.run`.

multiprocessing runs a main module again in every process that it copies, a package's `__main__` excepted. Each kernel
would import what the runner needs, which takes 3 s (`lib.kernels`).
"""

import sys

from lib.run import main

if __name__ == "__main__":
    sys.exit(main())
