"""`python -m diffusers_graft <verb>`."""

import sys

from .cli import main

sys.exit(main())
