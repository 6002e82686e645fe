"""Shows what a model's linear layers, convolutions and BatchNorm layers read while images run through them.

In: a model and images. Out: the calls, their inputs as rows, and least squares on sums over these rows; how far
outputs are from each other.
"""
from .image_batches import fast_format, image_batches, labelled_batches
from .least_squares import Sums, solve_ridge
from .linear_calls import LinearCall
from .listing import Reader, list_readers
from .lockstep import Lockstep, places_to_join
from .outputs import are_logits, divergence, has_classes, output_tensors
from .sampling import sample_positions
from .watch import Call, NormCall, Watch

__all__ = [
    'Call', 'LinearCall', 'Lockstep', 'NormCall', 'Reader', 'Sums', 'Watch', 'are_logits', 'divergence',
    'fast_format', 'has_classes', 'image_batches', 'labelled_batches', 'list_readers', 'output_tensors',
    'places_to_join', 'sample_positions', 'solve_ridge',
]
