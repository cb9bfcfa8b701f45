"""Tasks of joint training: their data, losses, metrics, and what is checked before the first step."""
