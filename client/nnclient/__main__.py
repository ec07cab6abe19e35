"""`python -m nnclient` -> the command nnclient."""

import sys

from nnclient.cli import main

sys.exit(main())
