"""Fitting a dictionary to pretrained weights without data: what `surgery.fit` is made of.

sensitivity  how much each tensor's error moves its member's output
units        what can be stored in more than one way, what each way costs and how wrong it is
allocation   the cheapest choice of ways under a budget or an error bound
trial        members running with trial weights
"""
