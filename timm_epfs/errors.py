"""The one exception a user of timm_epfs has to know."""


class PruningError(ValueError):
    """What was asked can't be done. The message is one line: what was asked, what was found, what to do."""
