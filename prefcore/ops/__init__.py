"""The differentiable ops, one module each: checks, registration, autograd, schedule, choice of implementation."""
