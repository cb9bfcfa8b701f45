"""Files: read within bounds, written whole or not at all, and never deleted unless this tool wrote them."""
