"""What a user chooses: recipes, settings of training, and what is said of those that do not hold."""
