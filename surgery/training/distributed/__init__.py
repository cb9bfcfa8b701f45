"""Several processes: what each holds of a joint model, and what they owe one another."""
