"""Members: what a reference can be, how it becomes a module, and how that is built again and saved."""
