"""Recipes that are installed with surgery: each YAML file here is complete, for `surgery merge --config NAME` or
`surgery train NAME`; the Python files hold the networks and the data that they name."""

SHIPPED = frozenset(
    f"surgery_recipes.{name}"
    for name in (
        "alphabets:alphabet", "brown:brown", "fashion:fashion_mnist", "isometric:cnn", "isometric:vit",
        "lettered:lettered", "mnist:mnist", "nets:deepbind", "nets:lenet", "nets:word_model",
        "ordered:ordered", "ordered:pairs", "ordered:patterns", "ordered:two_orders",
        "pretrained:efficientnet", "pretrained:minilm_regressor", "routed:clusters", "routed:digits",
        "routed:regression", "routed:related", "sentiment:sentiment", "splice:splice", "synthetic:data",
        "synthetic:grouped", "synthetic:regressions", "uci:uci",
    )
)  # fmt: skip
"""Functions that an artifact may name without the user's consent: they read nothing but data of known digests."""

PLACES = frozenset({"file", "folder"})
"""Options of these functions that name a file or folder of the user's own."""
