"""Shows what a model's linear layers, convolutions and BatchNorm layers read while images run through them.

In: a model and images. Out: the calls, their inputs as rows, and least squares on sums over these rows.
"""
from .image_batches import image_batches, labelled_batches
from .least_squares import Sums, solve_ridge
from .linear_calls import LinearCall
from .listing import Reader, list_readers
from .lockstep import Lockstep
from .sampling import sample_positions
from .watch import Call, NormCall, Watch

__all__ = [
    'Call', 'LinearCall', 'Lockstep', 'NormCall', 'Reader', 'Sums', 'Watch', 'image_batches', 'labelled_batches',
    'list_readers', 'sample_positions', 'solve_ridge',
]
