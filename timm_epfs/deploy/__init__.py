"""Where models run.

In: a model. Out: ONNX and torch.export files that were checked as they were written; its time and memory.
"""
