"""Methods from the literature, each a module: pure functions of its paper, and one `Peer` that says what is swept."""
