"""The trainer behind ``timm-epfs train``: dense training, learning the cut, cutting and fine-tuning in one run.

- ``options``: what can be asked for, and which of it goes together.
- ``data``: the datasets and loaders.
- ``stage``: one phase, epoch by epoch.
- ``checkpoints``: what is saved after each epoch, without pickle.
- ``run``: the phases one after the other.
- ``summary``, ``pictures``: what is written for people.
"""
