"""What any room may use: text, progress, pictures, randomness, memory, copies of modules."""
