"""Methods of sharing, a folder each: mathematics, plan, banks, fit, training moves, settings and pictures."""
