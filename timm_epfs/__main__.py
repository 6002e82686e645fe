"""``python -m timm_epfs`` is ``timm-epfs``."""
import sys

from .cli import main

sys.exit(main())
