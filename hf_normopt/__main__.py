"""`python -m hf_normopt` is the command `hf-normopt`."""

import sys

from .cli.commands import main

sys.exit(main())
