"""The command line of surgery: one file per verb, each a thin call of the library."""
