"""Fitting a dictionary to pretrained weights without data: what `surgery.fit` is made of.

trial        members running with trial weights
sensitivity  how much each tensor's error moves its member's output
metric       what any error in a site's weight costs, also one that lies along few directions
moments      second moments of what every site is multiplied with
scene        what is being fitted, as methods see it: members, their tensors, sensitivities, the target
units        what can be stored in more than one way, what each way costs and how wrong it is
groups       every tensor of every member as such units: alone, with related ones, or as a method arranges it
related      which sites resemble one another, and the ways of storing these together
arranging    banks of any method as arrangements, from `make`, `pack` and `unpack` alone
tabulated    what there is to choose from, as arrays, and what is chosen
allocation   the cheapest choice of ways under a budget or an error bound
exchanges    of single options, which use up what multipliers leave of a limit
assembly     a choice put together as a stored joint model
decoding     the weights that members have when they run from a stored form
closing      by how much what is aimed at must differ from a bound
attempts     choices that are put together, counted and measured
search       choices corrected by what members show when they run
exactly      instead of all this, what settings ask for, in the members' precision
report       what was met, and what each means saved

What belongs to one way of sharing lies in its folder of `surgery.methods`.
"""
