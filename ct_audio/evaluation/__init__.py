"""NLL of a split, and everything that is measured with it."""
