"""What a member is made of: sites, stacks of layers, and the plan of what is shared."""
