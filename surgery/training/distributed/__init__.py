"""Training in several processes that each hold a part of the joint model."""
