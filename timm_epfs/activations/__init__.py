"""What the layers of a model read and write while images run through it.

In: a model and images. Out: for each layer that is linear in its weight, its inputs as rows, and sums over them.
"""
