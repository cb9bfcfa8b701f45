"""Fitting a dictionary to pretrained weights without data: what `surgery.fit` is made of.

trial        members running with trial weights
sensitivity  how much each tensor's error moves its member's output
units        what can be stored in more than one way, what each way costs and how wrong it is
groups       every tensor of every member as such units, alone, as rows that siblings share, or from templates
stack_layers, template_groups   the layers of stacks, and their templates of every number as arrangements
allocation   the cheapest choice of ways under a budget or an error bound
assembly     a choice put together as a stored joint model
closing      by how much what is aimed at must differ from a bound
search       choices corrected by what members show when they run
fixed_bank, template_bank   instead of all this, exactly K hypermodules, or K templates for each stack
report       what was met, and what each means saved
"""
