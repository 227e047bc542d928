"""Our results beside those of the paper."""
