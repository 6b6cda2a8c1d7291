"""Run the command line as `python -m weightstream.cli`."""

from weightstream.cli import main

raise SystemExit(main())
