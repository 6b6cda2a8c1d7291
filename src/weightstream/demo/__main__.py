"""`python -m weightstream.demo [PICTURE]`."""

import sys

from weightstream.demo.run import main

if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
