"""Training loops written by hand, wrong and right, one module a framework.

Each has a function `train(settings, batches, right, on_step)` that trains the
network of a run from its initial weights and returns it. `tensorflow1` has
its own network and returns its variables.
"""
