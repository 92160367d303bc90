"""The oracle of each op: the shortest readable PyTorch, in the dtype it is given, differentiable."""
