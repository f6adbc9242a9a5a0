"""`python -m diffusers_graft VERB`."""

import sys

from diffusers_graft_cli import main

sys.exit(main())
